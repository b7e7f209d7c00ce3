#!/bin/busybox sh
# First process of the VFIO lab's guest. The kernel command line says cases=NAME,NAME,...
# Each case is a function case_NAME; it fails when a command in it fails. Lines for the harness:
#   LAB ok NAME SECONDS / LAB FAIL NAME / LAB skipped NAME: WHY     one per case
#   LAB QMP {...}                                                   a command for the emulator
#   LAB DONE                                                        the end
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
printf 'root:x:0:0::/:/bin/sh\nlab:x:1000:1000::/:/bin/sh\n' > /etc/passwd
echo 64 > /proc/sys/vm/nr_hugepages

say() { echo "LAB $*"; }
for m in $(cat /modules); do insmod "$m" $(cat "$m.options" 2>/dev/null) || say "FAIL insmod $m"; done

PCI=/sys/bus/pci/devices
# The address of the controller with a serial number, while the kernel's driver has it.
address() {
    for c in /sys/class/nvme/nvme*; do
        [ "$(tr -d ' ' < $c/serial)" = "$1" ] && cat $c/address
    done
}
driver() { basename "$(readlink $PCI/$1/driver 2>/dev/null)"; }
hand_over() { # ADDRESS DRIVER
    [ -e $PCI/$1/driver ] && echo $1 > $PCI/$1/driver/unbind
    if [ $2 = nvme ]; then echo > $PCI/$1/driver_override; else echo $2 > $PCI/$1/driver_override; fi
    echo $1 > /sys/bus/pci/drivers_probe
    [ "$(driver $1)" = $2 ]
}
to_vfio() { [ "$(driver $1)" = vfio-pci ] || hand_over $1 vfio-pci; }
to_kernel() { [ "$(driver $1)" = nvme ] || hand_over $1 nvme; }
# The kernel's block device for a namespace: ADDRESS NSID
disk() {
    for _ in $(seq 100); do
        for d in $PCI/$1/nvme/nvme*/nvme*n*; do
            [ "$(cat $d/nsid 2>/dev/null)" = $2 ] && [ -b /dev/$(basename $d) ] || continue
            [ "$(cat $d/size)" -gt 0 ] && echo /dev/$(basename $d) && return 0
        done
        sleep 0.1
    done
    echo "no block device for $1 namespace $2" >&2
    return 1
}
sum() { sha256sum | cut -d' ' -f1; }
random() { dd if=/dev/urandom of=$1 bs=64k count=$2 2>/dev/null; }
fill() { dd if=/dev/urandom of=$1 bs=1M oflag=direct 2>/dev/null || true; }
same() { [ "$1" = "$2" ] || { echo "differs: $3: $1, $2"; return 1; }; }
# Fails if the arguments of grep find something: a line with ! in front cannot end a case.
absent() { if grep "$@"; then return 1; fi; }
# Runs a command that must fail and say something: PATTERN COMMAND...
refused() {
    pattern=$1; shift
    if "$@" > /tmp/said 2>&1; then echo "not refused: $*"; return 1; fi
    cat /tmp/said
    grep -q "$pattern" /tmp/said
}
# Runs qemu-io, which must not fail nor say so.
io() {
    qemu-io "$@" > /tmp/io 2>&1 || { cat /tmp/io; return 1; }
    if grep -iE 'error|fail' /tmp/io; then return 1; fi
}
# Serves a node on /tmp/NAME.sock; ends with `stop NAME`.
serve() { # NAME arguments...
    name=$1; shift
    polldisk -v nbd --socket /tmp/$name.sock "$@" > /tmp/$name.out 2> /tmp/$name.err &
    echo $! > /tmp/$name.pid
    for _ in $(seq 300); do
        grep -q '^listening' /tmp/$name.out && return 0
        kill -0 $(cat /tmp/$name.pid) 2>/dev/null || break
        sleep 0.1
    done
    cat /tmp/$name.err; return 1
}
running() { kill -0 $(cat /tmp/$1.pid); }
stop() {
    kill $(cat /tmp/$1.pid)
    for _ in $(seq 150); do
        if ! kill -0 $(cat /tmp/$1.pid) 2>/dev/null; then wait $(cat /tmp/$1.pid); return; fi
        sleep 0.1
    done
    echo "$1 does not end"; cat /tmp/$1.err; return 1
}
uri() { echo "nbd+unix:///?socket=/tmp/$1.sock"; }

. /cases.sh

run() {
    start=$(cut -d' ' -f1 /proc/uptime)
    ( set -e; case_$1 ) > /tmp/log 2>&1
    rc=$?
    took=$(echo "$(cut -d' ' -f1 /proc/uptime) $start" | awk '{print $1 - $2}')
    if [ $rc = 0 ]; then say "ok $1 $took"
    elif [ $rc = 77 ]; then say "skipped $1: $(tail -1 /tmp/log)"
    else
        say "FAIL $1 after $took s, status $rc"
        tail -40 /tmp/log | sed 's/^/    | /'
        for f in /tmp/*.err; do [ -s "$f" ] && echo "    $f" && tail -15 "$f" | sed 's/^/    | /'; done
    fi
    for p in /tmp/*.pid; do [ -f $p ] && kill -9 $(cat $p) 2>/dev/null && sleep 1; done
    rm -rf /tmp/*
}
words=$(cat /proc/cmdline)
for word in $words; do
    case $word in cases=*) for c in $(echo ${word#cases=} | tr , ' '); do run $c; done ;; esac
done
if dmesg | grep -E 'DMAR: .*fault|BUG:|Oops|blocked for more|Call Trace' > /tmp/bad; then
    say "FAIL kernel: $(head -3 /tmp/bad | tr '\n' ';')"
fi
say "DONE $(cut -d' ' -f1 /proc/uptime)"
poweroff -f
