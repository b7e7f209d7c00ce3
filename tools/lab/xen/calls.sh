# System calls for each request of a guest, in each mode of the backend; sourced by dom0.sh. strace
# counts them for each thread, from outside. The guest counts its requests.

CLOCKS=/sys/devices/system/clocksource/clocksource0/available_clocksource

# The daemon's threads with that name, or all others: reactor | others
threads() {
    for t in /proc/$(cat /run/polldisk.pid)/task/*; do
        case $(cat $t/comm) in reactor*) is=reactor ;; *) is=others ;; esac
        [ $is != $1 ] || echo ${t##*/}
    done
}
# QEMU for the guest.
qemu_of_it() { ps -o pid,args | grep -v grep | awk "/xen-domid $(id $it) / { print \$1 }"; }

# Counts the calls of threads until `counted`: NAME OPTIONS THREAD...
count() {
    to=$R/calls.$1 options=$2; shift 2
    strace -qq $options -c -U name,calls -o $to $(for t in "$@"; do echo -p $t; done) 2> $to.err &
    echo $! > $to.pid
    for t in "$@"; do within 20 traced $t; done
}
traced() { grep -q '^TracerPid:[^0-9]*[1-9]' /proc/*/task/$1/status; }
# Afterwards $R/calls has "NAME NUMBER" for each call.
counted() { # NAME
    pid=$(cat $R/calls.$1.pid)
    kill $pid
    # It ends with the status of a signal.
    wait $pid || true
    awk '$2 ~ /^[0-9]+$/ && $1 != "total" { print $1, $2 }' $R/calls.$1 > $R/calls
}
# How many of the calls that were counted last have this name (or another, with !): NAMES
how_many() {
    case $1 in
        !*) awk -v n=" ${1#!} " 'index(n, " " $1 " ") == 0 { s += $2 } END { print s + 0 }' $R/calls ;;
        *) awk -v n=" $1 " 'index(n, " " $1 " ") { s += $2 } END { print s + 0 }' $R/calls ;;
    esac
}
# GROUP IS MOST
few() { [ $2 -le $3 ] || { echo "$mode: $2 calls of $1, at most $3"; cat $R/calls; return 1; }; }
# There is no way without these, so that none means that nothing was counted: GROUP IS
some() { [ $2 -gt 0 ] || { echo "$mode: no calls of $1"; cat $R/calls; return 1; }; }

# One line of the table: what was called for a load of the guest, for how many `requests`: MODE.
# Afterwards $R/calls has what the reactor did (QEMU: all of its threads).
measure() {
    mode=$1 others=0
    # What comes once is not counted: grants are mapped, maps loaded.
    ask $it 300 load xvda 100
    if [ $BACKEND = polldisk ]; then
        count others '' $(threads others)
        count reactor '' $(threads reactor)
    else
        # It has threads that come and go.
        count reactor -f $(qemu_of_it)
    fi
    ask $it 600 load xvda 250
    if [ $BACKEND = polldisk ]; then
        counted others
        others=$(how_many '!')
    fi
    counted reactor
    requests=$(tr -d '\r' < "$(log $it)" | sed -n 's/^REQUESTS //p' | tail -1)
    awk -v m="$mode" -v r=$requests -v c="$(how_many '!')" -v o=$others -v n="$(sort -k2 -rn $R/calls | tr '\n' ' ')" 'BEGIN {
        printf "LAB NOTE calls: %s: %d requests, %d calls (%.3f), other threads %.3f: %s\n", m, r, c, c / r, o / r, n
    }' | tee /dev/console
    [ $requests -ge 2000 ]
}

# All modes with one guest; the daemon is started again in between, and the guest goes on: LEAF GRANTS
modes() {
    for policy in poll adaptive; do
        for notify in spinning thread direct; do
            backend_stop
            backend_start "policy = '$policy'" "notify = '$notify'"
            measure "$1, $2, $policy, $notify"
            known="io_uring_enter ioctl write poll read restart_syscall"
            # On a busy host dom0's kernel may come to distrust the TSC; the clock it has then is a call.
            grep -qw tsc $CLOCKS || known="$known clock_gettime"
            few "names that are not known" "$(how_many "!$known")" 0
            # A turn that sends something to the file has a request of the guest's.
            most=0
            [ $1 = nvme ] || most=$requests
            few io_uring_enter "$(how_many io_uring_enter)" $most
            [ $most = 0 ] || some io_uring_enter "$(how_many io_uring_enter)"
            # A batch of copies, and an event, have at least one request.
            most=0
            [ $2 = persistent ] || most=$((most + requests))
            [ $notify != direct ] || most=$((most + requests))
            few ioctl "$(how_many ioctl)" $most
            [ $most = 0 ] || some ioctl "$(how_many ioctl)"
            # Who sends the events, if not the reactor.
            [ $notify = direct ] || some 'other threads' $others
            # A notifier that sleeps is woken. A reactor that is going to sleep lets ports fire again that have
            # fired, one perhaps before; then it may find something to do, and not sleep.
            most=0
            [ $notify != thread ] || most=$requests
            [ $policy = poll ] || most=$((most + requests + 1))
            few write "$(how_many write)" $most
            [ $policy = adaptive ] || few 'sleeping' "$(how_many 'poll read restart_syscall')" 0
        done
    done
}
# With a guest of each kind: LEAF DISK
calls_of() {
    for grants in copy persistent; do
        case $grants in
            copy) it=a options=feature_persistent=0 ;;
            persistent) it=b options= ;;
        esac
        start $it pv 1 "$options" xvda=$2
        ask $it 60 disk xvda
        # Clusters for all that is read and written.
        ask $it 300 load xvda 500
        if [ $BACKEND = polldisk ]; then modes $1 $grants; else measure "$1, $grants, $BACKEND"; fi
        ask $it 60 quiet
        off $it
    done
    # As it was for the other cases.
    [ $BACKEND != polldisk ] || { backend_stop; backend_start; }
}
case_calls() {
    image a 128M
    calls_of file $A
    qemu-img check -q -f qcow2 $A
}
case_device_calls() {
    on=$(device_image 128M)
    calls_of nvme "$on"
    qemu-img check -q -f qcow2 "$(device_back "$on")"
}
