# Backends of the Xen lab; sourced by dom0.sh. BACKEND says which:
#   qdisk     QEMU's own, started by the toolstack (xl) for each guest
#   qemu      the same, with the lab as the toolstack: it makes domains without disks, writes what
#             belongs into xenstore, and starts QEMU. So it proves that for the next one
#   polldisk  the daemon, with the lab as the toolstack
# A disk is written VDEV=IMAGE (xvda=/images/a.qcow2, xvda=vfio:0000:00:04.0/1).

number() { # VDEV: its number in xenstore
    case $1 in xvda) echo 51712 ;; xvdb) echo 51728 ;; xvdc) echo 51744 ;; esac
}
back() { echo /local/domain/0/backend/qdisk/$(id $1)/$(number $2); }
front() { echo /local/domain/$(id $1)/device/vbd/$(number $2); }
state() { xenstore-read $1/state 2>/dev/null; }
in_state() { [ "$(state $1)" = $2 ]; }
no_node() { ! xenstore-exists $1; }
spec() { echo "format=qcow2,vdev=${1%%=*},access=rw,backendtype=qdisk,target=${1#*=}"; }

# Makes an image: NAME SIZE
image() { qemu-img create -q -f qcow2 -o cluster_size=64k /images/$1.qcow2 $2; }

# An image right on the NVMe device with the serial number DISK, which the case and not the kernel has
# for as long as polldisk serves it: SIZE. Says how the image is named for `start`.
device_image() {
    d=$(device DISK)
    qemu-img create -q -f qcow2 $d $1
    if [ $BACKEND != polldisk ]; then echo $d; return; fi
    address=$(cat /sys/class/nvme/$(basename ${d%n1})/address)
    hand_over $address vfio-pci
    echo vfio:$address/1
}
# Gives the device back to the kernel and says what it is called there: IMAGE
device_back() {
    if [ $BACKEND = polldisk ]; then
        address=${1#vfio:}
        hand_over ${address%/*} nvme
        within 30 device DISK
    fi
    device DISK
}
hand_over() { # ADDRESS DRIVER
    p=/sys/bus/pci/devices/$1
    [ ! -e $p/driver ] || echo $1 > $p/driver/unbind
    if [ $2 = nvme ]; then echo > $p/driver_override; else echo $2 > $p/driver_override; fi
    echo $1 > /sys/bus/pci/drivers_probe
    [ "$(basename "$(readlink $p/driver)")" = $2 ]
}

# Starts a guest and waits until it has booted: NAME TYPE VCPUS OPTIONS DISK...
start() {
    name=$1
    config "$1" "$2" "$3" "$4"; shift 4
    echo "$*" > $R/$name.disks
    if [ $BACKEND = qdisk ]; then
        disks=
        for d in "$@"; do disks="$disks'$(spec $d)',"; done
        echo "disk = [$disks]" >> $R/$name.cfg
        xl create -q $R/$name.cfg
        xl domid $name > $R/$name.id
    else
        xl create -q -p $R/$name.cfg
        xl domid $name > $R/$name.id
        [ $BACKEND = polldisk ] || qemu_start $name
        for d in "$@"; do publish $name ${d%%=*} ${d#*=}; done
        xl unpause $name
    fi
    booted $name
}
# What a toolstack writes for a disk: NAME VDEV IMAGE. The folders above are made first, with the
# rights that the rest inherits; then xenstore-write sets all keys in one transaction.
publish() {
    case $3 in /*) node=file:$3 ;; *) node=$3 ;; esac
    b=$(back $1 $2) f=$(front $1 $2) n=$(number $2)
    xenstore-write ${b%/*} ''
    xenstore-chmod ${b%/*} n0 r$(id $1)
    xenstore-write ${f%/*} ''
    xenstore-chmod ${f%/*} n$(id $1) r0
    xenstore-write \
        $b/frontend $f $b/frontend-id $(id $1) $b/online 1 $b/removable 1 $b/bootable 1 $b/state 1 \
        $b/dev $2 $b/type qdisk $b/mode w $b/device-type disk \
        $b/params qcow2:$3 $b/discard-enable 1 \
        $b/sm-data/polldisk "{\"node\":\"$node\",\"format\":\"qcow2\"}" \
        $f/backend $b $f/backend-id 0 $f/state 1 $f/virtual-device $n $f/device-type disk
}
# As a toolstack takes a disk away: NAME VDEV. One that is closed is left as it is, as libxl does.
retract() {
    b=$(back $1 $2)
    if xenstore-exists $b && ! in_state $b 6; then
        xenstore-write $b/online 0 $b/state 5
        within 30 in_state $b 6 || { echo "the backend of $2 stays in state $(state $b)"; return 1; }
    fi
    xenstore-rm $b
    xenstore-rm $(front $1 $2) 2>/dev/null || true
}

# A disk comes to a guest that runs: NAME DISK
plug() {
    echo "$(cat $R/$1.disks) $2" > $R/$1.disks
    if [ $BACKEND = qdisk ]; then xl block-attach $1 $(spec $2); else publish $1 ${2%%=*} ${2#*=}; fi
    within 60 in_state $(front $1 ${2%%=*}) 4
}
# And goes: NAME VDEV
unplug() {
    if [ $BACKEND = qdisk ]; then xl block-detach $1 $2; else retract $1 $2; fi
    within 30 no_node $(back $1 $2)
}
# Waits until nobody has the images of a guest that has ended: NAME
release() {
    if [ $BACKEND = qdisk ]; then
        within 30 no_qemu $(id $1)
    else
        for d in $(cat $R/$1.disks); do retract $1 ${d%%=*}; done
        [ $BACKEND = polldisk ] || qemu_stop $1
    fi
}
# QEMU for a guest's disks, as libxl starts it: NAME
qemu_start() {
    /usr/libexec/xen-qemu-system-i386 -xen-domid $(id $1) -xen-attach -name $1 -nodefaults -no-user-config \
        -vnc none -display none -machine xenpv -m 192 < /dev/null > $R/qemu-$1.err 2>&1 &
    echo $! > $R/$1.qemu
    within 60 in_state /local/domain/0/device-model/$(id $1) running
}
qemu_stop() {
    kill "$(cat $R/$1.qemu)"
    within 30 no_qemu $(id $1)
}
no_qemu() { ! ps -o args | grep -v grep | grep -q "xen-domid $1 "; }

# The size that a guest sees of a disk that it uses: NAME VDEV BYTES. QEMU has no command for that
# which xl passes on, so there the lab writes what a backend writes, within what the image has.
resize() {
    if [ $BACKEND != polldisk ]; then
        b=$(back $1 $2)
        xenstore-write $b/sectors $(($3 / 512))
        xenstore-write $b/state 4
    else
        polldisk ctl --image $(id $1)/$(number $2) resize $3
    fi
}

# The daemon. Its flag is for an NVMe device: dom0's kernel has no IOMMU. LINES of its configuration may follow.
backend_start() {
    [ $BACKEND = polldisk ] || return 0
    mkdir -p /run/polldisk
    printf '%s\n' 'backend = "qdisk"' "$@" > /etc/polldisk.toml
    rm -f /run/polldisk.status
    (
        polldisk --unsafe-noiommu serve --config /etc/polldisk.toml >> /run/polldisk.err 2>&1 &
        echo $! > /run/polldisk.pid
        wait $! && status=0 || status=$?
        echo $status > /run/polldisk.status
    ) &
    within 30 polldisk ctl list
}
backend_runs() { [ $BACKEND != polldisk ] || kill -0 "$(cat /run/polldisk.pid)"; }
backend_kill() {
    kill -9 "$(cat /run/polldisk.pid)"
    within 10 test -e /run/polldisk.status
}
# As an administrator ends it: it must end by itself, with status 0.
backend_stop() {
    [ $BACKEND = polldisk ] || return 0
    kill "$(cat /run/polldisk.pid)"
    within 30 test -e /run/polldisk.status
    same "$(cat /run/polldisk.status)" 0 'status of the daemon'
}

# After each case: nothing of it runs on.
sweep() {
    for d in $(xenstore-list /local/domain); do [ "$d" = 0 ] || xl destroy "$d"; done > /dev/null 2>&1
    killall -q -9 xl xen-qemu-system-i386
    [ ! -e $R/xl-daemon.pid ] || kill -9 "$(cat $R/xl-daemon.pid)"
    for k in qdisk vbd; do
        for d in $(xenstore-list /local/domain/0/backend/$k 2>/dev/null); do
            xenstore-rm /local/domain/0/backend/$k/$d
        done
    done
    umount /mnt 2>/dev/null
}
