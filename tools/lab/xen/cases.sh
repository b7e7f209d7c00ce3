# The cases of the Xen lab; sourced by dom0.sh. Each starts its own guests on its own images, and ends
# with a verdict on those by others than the backend (guests.sh: judge).
A=/images/a.qcow2
B=/images/b.qcow2

# A guest makes a file system, writes, trims, reads back: TYPE VCPUS OPTIONS
guest_on_a() {
    image a 128M
    start a "$1" "$2" "$3" xvda=$A
    ask a 60 disk xvda
    ask a 120 make xvda
    ask a 60 check xvda
}
guest_ends() {
    off a
    judge a $A
}

# Grants, event channels and xenstore as the daemon uses them, by dom0 for itself.
case_interfaces() { loopback; }

# What the guest's driver does by default: a ring of one page, one queue.
case_pv() {
    guest_on_a pv 1 ''
    no_node "$(front a xvda)/ring-page-order"
    no_node "$(front a xvda)/multi-queue-num-queues"
    guest_ends
}

# Two CPUs, a ring of several pages, and one for each CPU where the backend has more than one.
case_pv_multi() {
    guest_on_a pv 2 max_ring_page_order=2,max_queues=2
    same "$(xenstore-read "$(front a xvda)/ring-page-order")" 2 'order of the ring'
    [ $BACKEND != polldisk ] || same "$(xenstore-read "$(front a xvda)/multi-queue-num-queues")" 2 'queues'
    guest_ends
}

# A guest in a container of hardware; it has the same driver.
case_pvh() {
    guest_on_a pvh 1 ''
    guest_ends
}

# A second disk comes and goes while the first is written.
case_hotplug() {
    image a 128M
    image b 64M
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    ask a 60 churn xvda
    plug a xvdb=$B
    ask a 60 disk xvdb
    ask a 120 make xvdb
    ask a 60 check xvdb
    unplug a xvdb
    ask a 60 no_disk xvdb
    judge a $B ' ./first/'
    # The same disk once more.
    plug a xvdb=$B
    ask a 60 disk xvdb
    ask a 60 check xvdb
    unplug a xvdb
    ask a 60 no_disk xvdb
    ask a 60 churned xvda
    off a
    judge a $A ' ./file'
}

# The disk grows under a mounted file system.
case_resize() {
    image a 64M
    [ $BACKEND = polldisk ] || qemu-img resize -q $A 96M
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    resize a xvda $((64 << 20))
    ask a 60 size xvda $((64 << 20))
    ask a 60 churn xvda
    within 60 has_files a 3
    resize a xvda $((96 << 20))
    ask a 60 size xvda $((96 << 20))
    ask a 60 resize2fs /dev/xvda
    ask a 60 random of=/mnt/more bs=1M count=48
    ask a 60 churned xvda
    off a
    judge a $A
}

# What was forced to the disk before a guest went away in the middle of its writes is there, and the
# next guest goes on with the disk.
case_reboot() {
    image a 128M
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    ask a 60 churn xvda
    within 60 has_files a 5
    tell a reboot -f
    ended a
    judge a $A . dirty
    start b pv 1 '' xvda=$A
    ask b 60 disk xvda
    ask b 120 more xvda
    ask b 60 check xvda
    off b
    judge b $A
}
case_destroy() {
    image a 128M
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    ask a 60 churn xvda
    within 60 has_files a 5
    xl destroy a
    ended a
    judge a $A . dirty
}

# Two guests at the same time.
case_two_guests() {
    image a 128M
    image b 128M
    start a pv 1 '' xvda=$A
    start b pv 1 '' xvda=$B
    for g in a b; do ask $g 60 disk xvda; done
    for g in a b; do tell $g make xvda; done
    for g in a b; do told $g 180; done
    for g in a b; do ask $g 60 check xvda; done
    off a
    # The other one is not disturbed by that.
    ask b 60 check xvda
    off b
    judge a $A
    judge b $B
}

# polldisk drives an NVMe device in a dom0 of which Xen, and not its kernel, has the IOMMU. What the
# kernel wrote polldisk reads, and the other way round; an image on the device, judged by qemu-img.
case_driver() {
    noiommu="polldisk --unsafe-noiommu image"
    d=$(device DISK)
    a=$(cat /sys/class/nvme/$(basename ${d%n1})/address)
    dd if=/dev/urandom of=/images/x.raw bs=1M count=24 2>/dev/null
    truncate -s "$(blockdev --getsize64 $d)" /images/x.raw
    dd if=/images/x.raw of=$d bs=1M count=24 oflag=direct 2>/dev/null
    hand_over $a vfio-pci
    $noiommu compare -f raw -F raw /images/x.raw vfio:$a/1
    dd if=/dev/urandom of=/images/x.raw bs=1M seek=8 count=8 conv=notrunc 2>/dev/null
    $noiommu convert -f raw -O raw /images/x.raw vfio:$a/1
    hand_over $a nvme
    within 30 device DISK
    cmp -n $((24 << 20)) /images/x.raw "$(device DISK)"
    hand_over $a vfio-pci
    truncate -s 64M /images/x.raw
    $noiommu convert -f raw -O qcow2 /images/x.raw vfio:$a/1
    hand_over $a nvme
    within 30 device DISK
    qemu-img check -q -f qcow2 "$(device DISK)"
    qemu-img compare -q -f qcow2 -F raw "$(device DISK)" /images/x.raw
}

# An image right on an NVMe device, with a PV and a PVH guest: TYPE
guest_on_device() {
    on=$(device_image 128M)
    start a $1 1 '' "xvda=$on"
    ask a 60 disk xvda
    ask a 120 make xvda
    ask a 60 check xvda
    off a
    judge a "$(device_back "$on")"
}
case_device_pv() { guest_on_device pv; }
case_device_pvh() { guest_on_device pvh; }

# The backend goes three times while a guest writes, and is started again: the guest notices nothing
# but a pause. HOW: the command that ends it
backend_goes() {
    image a 128M
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    ask a 60 churn xvda
    for round in 1 2 3; do
        within 60 has_files a $((round * 5))
        $1
        sleep 1
        backend_start
        within 60 has_files a "$(($(files a) + 3))"
    done
    ask a 60 churned xvda
    off a
    judge a $A
}
case_restart() { backend_goes backend_stop; }
case_crash() { backend_goes backend_kill; }
