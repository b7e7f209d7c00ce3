# A hostile guest in the Xen lab; sourced by dom0.sh. The guest runs `rogue` (ffi/xen/examples/rogue)
# instead of a disk driver; beside it an ordinary guest writes and checks its disk all the while.

# What all that may leave behind in the daemon, and take on the way, in KiB.
LEFT=$((16 << 10))
TAKEN=$((96 << 10))

# Figures of the daemon: KEY
figure() {
    p=/proc/$(cat /run/polldisk.pid)
    case $1 in
        descriptors) ls $p/fd | wc -l ;;
        grants) grep -c gntdev $p/maps ;;
        lines) wc -l < /run/polldisk.err ;;
        *) awk "/^$1:/ { print \$2 }" $p/status ;;
    esac
}
# FIGURE IS MOST
at_most() {
    echo "$1: $2, at most $3"
    [ $2 -le $3 ]
}
# Each group of tricks comes to its right end, while the other guest goes on.
tricks() {
    for group in "$@"; do
        n=$(files a)
        ask r 600 rogue $group
        within 60 has_files a $((n + 1))
    done
}
flooding() { grep -q ^flooding "$(log r)"; }

# An ordinary guest and a hostile one.
rogue_begins() {
    image a 512M
    image b 64M
    # The peak is counted from here.
    echo 5 > /proc/$(cat /run/polldisk.pid)/clear_refs
    rss=$(figure VmRSS) threads=$(figure Threads) descriptors=$(figure descriptors) lines=$(figure lines)
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    # Else none could be found missing either.
    [ $(figure grants) -gt 0 ] || { echo 'the pages of a guest are not among the mappings'; return 1; }
    ask a 60 churn xvda 3000
    start r pv 1 none xvda=$B
    began=$(now)
}
# Destroys the hostile one; then all is judged.
rogue_ends() {
    xl destroy r
    ended r
    took=$(echo "$(now) $began" | awk '{ print int($1 - $2) }')
    ask a 60 churned xvda
    off a
    judge a $A
    qemu-img check -q -f qcow2 $B
    # A line in ten seconds, and one for each disk that comes or goes.
    at_most 'lines in the log' $(($(figure lines) - lines)) $((took / 10 + 10))
    at_most 'pages still mapped' $(figure grants) 0
    # The kernel's workers for io_uring are threads too, and come and go.
    at_most threads $(figure Threads) $((threads + 4))
    at_most descriptors $(figure descriptors) $((descriptors + 4))
    at_most 'memory left, in KiB' $(($(figure VmRSS) - rss)) $LEFT
    at_most 'memory taken, in KiB' $(($(figure VmHWM) - rss)) $TAKEN
}

case_rogue_keys() {
    rogue_begins
    tricks keys requests
    rogue_ends
}
case_rogue_ring() {
    rogue_begins
    tricks ring grants
    rogue_ends
}
case_rogue_storms() {
    rogue_begins
    tricks storms vanish
    # The toolstack makes the disk anew; with it a guest that is destroyed in the middle of its requests.
    retract r xvda
    publish r xvda $B
    tell r rogue flood
    within 60 flooding
    n=$(files a)
    within 60 has_files a $((n + 5))
    rogue_ends
}
