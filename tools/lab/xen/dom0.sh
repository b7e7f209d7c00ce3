#!/bin/busybox sh
# First process of the Xen lab's dom0. The kernel command line says backend=KIND cases=NAME:NAME:...
# Each case is a function case_NAME; it fails when a command in it fails. Lines for the harness:
#   LAB ok NAME SECONDS / LAB FAIL NAME / LAB skipped NAME: WHY     one per case
#   LAB NOTE TEXT                                                   a figure, to be shown
#   LAB DONE                                                        the end
# What a failed case leaves goes to /images/failed/NAME, where the harness finds it.
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /run /var/log/xen /var/lib/xen /var/lib/xenstored /etc/xen /usr/libexec /usr/share/qemu/keymaps /images
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts && mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
mkdir -p /run/xen /run/lock /run/xenstored /run/lab
ln -s /run /var/run
ln -s /run/lock /var/lock
# QEMU looks for its data relative to where it is itself.
mv /bin/xen-qemu-system-i386 /usr/libexec/
mkdir -p /usr/lib/xen-4.17/bin
mv /bin/libxl-save-helper /usr/lib/xen-4.17/bin/
mv /etc/keymap /usr/share/qemu/keymaps/en-us
mv /etc/xl.conf /etc/xen/xl.conf
for tool in chmod exists list ls read rm watch write; do ln -s xenstore /bin/xenstore-$tool; done

say() { echo "LAB $*"; }
same() { [ "$1" = "$2" ] || { echo "$3: $1, not $2"; return 1; }; }
now() { cut -d' ' -f1 /proc/uptime; }
# Runs a command until it succeeds: SECONDS COMMAND... The seconds are those of a machine that is
# busy; the limit is three times that.
within() {
    read -r up _ < /proc/uptime
    end=$((${up%.*} + 3 * $1)); shift
    until "$@" > /dev/null 2>&1; do
        read -r up _ < /proc/uptime
        [ ${up%.*} -lt $end ] || { echo "never came true: $*"; return 1; }
        usleep 300000
    done
}
# The kernel's block device for the NVMe device with this serial number.
device() {
    for c in /sys/class/nvme/nvme*; do
        [ "$(tr -d ' ' < $c/serial)" = $1 ] && [ -b /dev/$(basename $c)n1 ] && echo /dev/$(basename $c)n1 && return 0
    done
    return 1
}
# Every wait has its own limit; this one is for a case that hangs elsewhere.
LIMIT=900

for m in $(cat /modules); do insmod "$m" $(cat "$m.options" 2>/dev/null) || say "FAIL insmod $m"; done
# For the NVMe driver. A PV dom0 has none.
echo 32 > /proc/sys/vm/nr_hugepages 2>/dev/null
mount -t xenfs xenfs /proc/xen
grep -q control_d /proc/xen/capabilities || say "FAIL boot: not a control domain"
xenstored -T /run/xenstore.trace --pid-file /run/xen/xenstored.pid || say "FAIL boot: xenstored"
xen-init-dom0 > /dev/null || say "FAIL boot: xen-init-dom0"
xenconsoled --log=all --log-dir=/var/log/xen --pid-file=/run/xen/xenconsoled.pid || say "FAIL boot: xenconsoled"
within 30 device IMAGES
mount -t ext4 "$(device IMAGES)" /images || say "FAIL boot: no disk for images"
for word in $(cat /proc/cmdline); do
    case $word in
        backend=*) BACKEND=${word#backend=} ;;
        cases=*) cases=$(echo "${word#cases=}" | tr : ' ') ;;
    esac
done
. /guests.sh
. /backends.sh
. /cases.sh
. /calls.sh
. /save.sh
. /xl.sh
. /hvm.sh
. /rogue.sh

# What is worth reading after a failure.
keep() {
    to=/images/failed/$1
    mkdir -p $to
    cp /tmp/log /var/log/xen/* /run/lab/*.err /run/polldisk.err $to 2>/dev/null
    tail -c +$trace /run/xenstore.trace > $to/xenstore.trace
    xenstore-ls -f -p > $to/xenstore
    xl list > $to/domains 2>&1
    xl dmesg > $to/xen 2>&1
    dmesg > $to/dmesg
    sync
    tail -30 /tmp/log | sed 's/^/    | /'
    for f in /var/log/xen/guest-*.log /run/lab/*.err /run/polldisk.err; do
        [ -s "$f" ] && echo "    $f" && tail -12 "$f" | tr -d '\r' | sed 's/^/    | /'
    done
}
run() {
    start=$(now)
    trace=$(wc -c < /run/xenstore.trace)
    ( set -e; case_$1 ) > /tmp/log 2>&1 &
    p=$!
    ( sleep $LIMIT; echo "over the limit of $LIMIT s" >> /tmp/log; kill -9 $p ) &
    watchdog=$!
    wait $p
    rc=$?
    kill $watchdog
    took=$(echo "$(now) $start" | awk '{print $1 - $2}')
    if [ $rc = 0 ]; then say "ok $1 $took"
    elif [ $rc = 77 ]; then say "skipped $1: $(tail -1 /tmp/log)"
    else
        say "FAIL $1 after $took s, status $rc: $(tail -1 /tmp/log)"
        keep $1
    fi
    sweep
    if ! backend_runs; then
        say "FAIL backend: it ended during $1"
        backend_start
    fi
    rm -rf /tmp/* /run/lab/* /var/log/xen/* /images/*.*
}
echo "NOTE toolstack ready at $(now) s, $(cat /sys/hypervisor/guest_type), backend $BACKEND"
backend_start > /tmp/log 2>&1 || { say "FAIL backend: $(tail -1 /tmp/log)"; keep backend; }
for c in $cases; do run $c; done
backend_stop > /tmp/log 2>&1 || { say "FAIL backend: $(tail -1 /tmp/log)"; keep backend; }
# On a busy host a CPU may stand still for so long that the kernel speaks of a lockup.
if dmesg | grep -E 'BUG:|Oops|WARNING:|blocked for more' | grep -v lockup > /tmp/bad; then
    say "FAIL kernel: $(head -3 /tmp/bad | tr '\n' ';')"
fi
umount /images
say "DONE $(now)"
poweroff -f
