# The cases of the VFIO lab; sourced by init.sh. Devices: serial A (512-byte blocks), B (namespaces
# 1 of 512, 3 of 4096 bytes, MDTS 8 KiB), H (behind a port that can be unplugged), S (slow), V (two
# namespaces of 40 MiB).
A=$(address A); B=$(address B); E=$(address E); H=$(address H); S=$(address S); V=$(address V)

# What is found before anything is bound.
case_refusals() {
    refused "held by the kernel's driver nvme" polldisk image compare -f raw -F raw vfio:$A/1 vfio:$A/1
    grep -q "polldisk device bind $A" /tmp/said
    refused "no PCI function at" polldisk image compare -f raw -F raw vfio:0000:7f:1f.7/1 vfio:$A/1
    grep -q $A /tmp/said
    refused "no NVMe controller" polldisk image compare -f raw -F raw vfio:0000:00:00.0/1 vfio:$A/1
}

# The commands for devices against the real kernel: refusals, there and back, a new block size.
case_device() {
    to_kernel $A
    polldisk device doctor | tee /tmp/doctor
    grep 'ok .*iommu: on' /tmp/doctor && grep 'ok .*interrupt-remapping: on' /tmp/doctor
    d=$(disk $A 1)
    dd if=/dev/zero of=$d bs=1M count=1 2>/dev/null
    printf 'o\nn\np\n1\n2048\n16383\nw\n' | fdisk $d > /dev/null
    for _ in $(seq 50); do [ -b ${d}p1 ] && break; sleep 0.1; done
    polldisk device list | tee /tmp/list
    grep "^$A .* A  *1  *16 MiB  *512  *nvme .* -$" /tmp/list
    mkswap ${d}p1 > /dev/null
    swapon ${d}p1
    polldisk device list | grep "^$A .*p1 is swap"
    refused 'p1 is swap' polldisk device bind $A
    # Where nothing of it is seen, the kernel still knows.
    mount --bind /dev/null /proc/swaps
    refused 'in use, by something that is not seen' polldisk device bind $A
    umount /proc/swaps
    swapoff ${d}p1
    sleep 1000 < ${d}p1 & p=$!
    refused 'open by sleep' polldisk device bind $A
    kill $p
    wait $p || true
    [ "$(driver $A)" = nvme ]

    polldisk device bind --json $A | grep '"changed": true'
    [ "$(driver $A)" = vfio-pci ]
    polldisk device bind $A | grep already
    polldisk device list | grep "^$A .* vfio-pci .* -$"
    polldisk device identify $A | tee /tmp/identify
    grep 'namespace 1: 16 MiB, blocks of 512$' /tmp/identify
    polldisk device health vfio:$A | grep 'no critical warning'
    refused 'yes formats without asking' polldisk device format $A
    random /tmp/data 256
    polldisk image convert -f raw -O raw /tmp/data vfio:$A/1
    polldisk device format --yes --lba 4096 $A
    polldisk device identify $A/1 | grep 'namespace 1: 16 MiB, blocks of 4096$'
    polldisk image convert -f raw -O raw vfio:$A/1 /tmp/copy
    [ "$(tr -d '\000' < /tmp/copy | wc -c)" = 0 ]
    serve x -f raw vfio:$A/1
    refused 'open by polldisk' polldisk device unbind $A
    refused 'another process' polldisk device format --yes $A
    stop x
    polldisk device unbind $A
    [ "$(driver $A)" = nvme ] && [ "$(cat $PCI/$A/driver_override)" = '(null)' ]
    [ "$(blockdev --getss $(disk $A 1))" = 4096 ]
    polldisk device bind $A
    polldisk device format --yes --lba 512 --secure-erase user-data vfio:$A/1
    polldisk device unbind $A
    [ "$(blockdev --getss $(disk $A 1))" = 512 ]

    to_vfio $B
    refused 'which namespace' polldisk device format --yes $B
    polldisk device format --yes --lba 512 $B/3
    polldisk device identify $B | grep 'namespace 3: 8 MiB, blocks of 512$'
    polldisk device format --yes --lba 4096 $B/3
    to_kernel $B
}

# The kernel writes, polldisk reads: every byte.
case_kernel_writes() {
    to_kernel $A
    d=$(disk $A 1)
    fill $d
    want=$(sum < $d)
    to_vfio $A
    polldisk image convert -f raw -O raw vfio:$A/1 /tmp/copy
    same "$want" "$(sum < /tmp/copy)" "what the kernel wrote"
    polldisk image compare -f raw -F raw /tmp/copy vfio:$A/1
    printf x | dd of=/tmp/copy bs=1 seek=500000 conv=notrunc 2>/dev/null
    refused . polldisk image compare -f raw -F raw /tmp/copy vfio:$A/1
}

# polldisk writes, the kernel reads.
case_kernel_reads() {
    to_vfio $A
    random /tmp/data 256
    polldisk image convert -f raw -O raw /tmp/data vfio:$A/1
    polldisk image compare -f raw -F raw /tmp/data vfio:$A/1
    to_kernel $A
    same "$(sum < /tmp/data)" "$(sum < $(disk $A 1))" "what polldisk wrote"
}

# Namespaces of both block sizes on one device with small transfers, both ways.
case_namespaces() {
    to_kernel $B
    for n in 1 3; do
        d=$(disk $B $n)
        fill $d
        eval want$n=$(sum < $d)
    done
    [ $(blockdev --getss $(disk $B 3)) = 4096 ]
    to_vfio $B
    for n in 1 3; do
        polldisk image convert -f raw -O raw vfio:$B/$n /tmp/copy$n
        eval want=\$want$n
        same "$want" "$(sum < /tmp/copy$n)" "namespace $n"
    done
    refused "no namespace 2; there are 1, 3" polldisk image compare -f raw -F raw vfio:$B/2 vfio:$B/1
    polldisk image convert -f raw -O raw vfio:$B/1 vfio:$B/3
    polldisk image compare -f raw -F raw vfio:$B/1 vfio:$B/3
    to_kernel $B
    same "$want1" "$(sum < $(disk $B 3))" "a copy within the device"
}

# Two devices at a time, in one process and in two.
case_two_devices() {
    to_vfio $A; to_vfio $B
    refused "leave --unsafe-noiommu out" polldisk --unsafe-noiommu image compare -f raw -F raw vfio:$A/1 vfio:$A/1
    serve a -f raw vfio:$A/1
    serve b -f raw vfio:$B/3
    refused "another process" polldisk image compare -f raw -F raw vfio:$A/1 vfio:$A/1
    for s in a b; do
        qemu-io -f raw -c "write -P 7 0 4M" -c "read -P 7 0 4M" $(uri $s) > /tmp/io.$s &
        eval p$s=$!
    done
    wait $pa; wait $pb
    grep -q 'read 4194304/4194304' /tmp/io.a && grep -q 'read 4194304/4194304' /tmp/io.b
    stop a; stop b
    polldisk image convert -f raw -O raw vfio:$B/1 vfio:$A/1
    polldisk image convert -f raw -O raw vfio:$A/1 /tmp/a
    polldisk image convert -f raw -O raw vfio:$B/1 /tmp/b
    cmp -n 8388608 /tmp/a /tmp/b
}

# What a client does to a raw disk and to a namespace; the kernel is the judge of the latter.
script() {
    for at in 0 1536 70000 1048064 4194304 5000192; do
        echo "-c|write -P $((at % 251 + 1)) $((at / 512 * 512)) $(((at % 7 + 1) * 4608))"
    done
    echo "-c|write -z 8192 12288|-c|write -z 1049088 512|-c|flush"
    echo "-c|write -f -P 9 6291456 1024|-c|write -zu 6291968 512|-c|flush"
}
case_client() { # over both block sizes
    to_vfio $A; to_vfio $B
    truncate -s 8M /tmp/zero
    truncate -s 8M /tmp/want
    IFS='|
'
    set -- $(script)
    IFS='
 '
    io -f raw "$@" /tmp/want
    for node in $A/1 $B/1 $B/3; do
        polldisk image convert -f raw -O raw /tmp/zero vfio:$node
        serve n -f raw vfio:$node
        io -f raw "$@" $(uri n)
        stop n
        a=${node%/*}
        to_kernel $a
        dd if=$(disk $a ${node#*/}) of=/tmp/got bs=1M count=8 iflag=direct 2>/dev/null
        cmp /tmp/want /tmp/got
        to_vfio $a
    done
}

# A QCOW2 image on a namespace of 4096-byte blocks: made, written, checked here and by qemu-img.
case_qcow2() {
    to_vfio $B
    polldisk image create -f qcow2 vfio:$B/3 6M
    serve q vfio:$B/3
    io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 512 512' -c 'write -P 3 5000192 70144' \
        -c 'write -z 65536 65536' -c 'discard 0 65536' -c 'write -P 4 512 1024' -c flush $(uri q)
    stop q
    polldisk image check vfio:$B/3
    polldisk image convert -O raw vfio:$B/3 /tmp/got
    to_kernel $B
    d=$(disk $B 3)
    qemu-img check -f qcow2 $d
    qemu-img compare -f qcow2 -F raw $d /tmp/got
    io -r -f qcow2 -c 'read -P 4 512 1024' -c 'read -P 3 5000192 70144' -c 'read -P 1 131072 900000' \
        -c 'read -P 0 65536 65536' $d
}

# An ordinary user with the group's file: refused for lack of locked memory, then served.
case_memlock() {
    to_vfio $A
    g=/dev/vfio/$(basename $(readlink $PCI/$A/iommu_group))
    chown 1000 $g
    chmod 666 /dev/vfio/vfio
    mkdir /tmp/u && chown 1000 /tmp/u
    random /tmp/u/data 16
    chmod 644 /tmp/u/data
    copy="polldisk image convert -f raw -O raw /tmp/u/data vfio:$A/1"
    refused 'ulimit -l' su lab -c "ulimit -l 64; $copy"
    su lab -c "ulimit -l 65536; $copy"
    # A soft limit that the process may raise itself.
    su lab -c "ulimit -l 65536; ulimit -S -l 64; $copy"
    chown 0 $g
}

# Under load the device is taken away: no crash, errors. Then one is plugged in again, and served.
unplug_and_back() {
    (while qemu-img bench -f raw -t none -c 2000 -d 32 -w --pattern 6 -o 4194304 $(uri h); do :; done) > /tmp/bench 2>&1 &
    load=$!
    sleep 1
    say 'QMP {"execute":"device_del","arguments":{"id":"hot"}}' > /dev/console
    for _ in $(seq 200); do [ -e $PCI/$H ] || break; sleep 0.1; done
    [ ! -e $PCI/$H ]
    wait $load || true
    tail -3 /tmp/bench
    running h
    grep 'the kernel wants it back' /tmp/h.err
    refused 'fail' qemu-io -f raw -c 'read 0 4096' $(uri h)
    running h
    say 'QMP {"execute":"device_add","arguments":{"driver":"nvme","id":"hot","bus":"rp0","drive":"hot","serial":"H"}}' > /dev/console
    for _ in $(seq 200); do [ -e $PCI/$H ] && break; sleep 0.1; done
    to_vfio $H
    for _ in $(seq 100); do grep -q 'there is a device again' /tmp/h.err && break; sleep 0.1; done
    for _ in $(seq 50); do io -f raw -c 'read -P 5 0 4M' $(uri h) && break; sleep 0.2; done
    grep 'read 4194304/4194304' /tmp/io
    io -f raw -c 'write -P 8 1M 1M' -c 'read -P 8 1M 1M' $(uri h)
    stop h
    cat /tmp/h.err
}
case_unplug() {
    to_vfio $H
    serve h -f raw vfio:$H/1
    io -f raw -c 'write -P 5 0 4M' -c flush $(uri h)
    unplug_and_back
}

# Errors of the medium, injected by QEMU: they arrive at the client, and nothing else does.
case_errors() {
    to_vfio $E
    serve e -f raw vfio:$E/1
    io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 3M 1M' -c flush $(uri e)
    for _ in 1 2 3; do
        refused 'Input/output error' qemu-io -f raw -c 'read 1M 4k' $(uri e)
        refused 'Input/output error' qemu-io -f raw -c 'write 2M 4k' $(uri e)
        # One bad block among many.
        refused 'Input/output error' qemu-io -f raw -c 'read 960k 128k' $(uri e)
    done
    io -f raw -c 'read -P 1 0 1M' -c 'read -P 2 3M 1M' -c 'write -P 3 4M 1M' -c 'read -P 3 4M 1M' $(uri e)
    absent -i 'reset' /tmp/e.err
    stop e
}

# Each rung of the reset ladder with commands in flight: disabled, function reset, bus master off.
case_ladder() {
    to_vfio $S
    ladder $S > /tmp/out || { cat /tmp/out; return 1; }
    cat /tmp/out > /dev/console
    # The device is well afterwards.
    random /tmp/data 16
    polldisk image convert -f raw -O raw /tmp/data vfio:$S/1
    to_kernel $S
    dd if=$(disk $S 1) of=/tmp/got bs=1M count=1 iflag=direct 2>/dev/null
    cmp /tmp/data /tmp/got
}

# Unbound while it is served: the kernel gets it back at once; bound again, it is served again.
case_unbind() {
    to_vfio $A
    serve u -f raw vfio:$A/1
    io -f raw -c 'write -P 5 0 4M' -c flush $(uri u)
    (while qemu-img bench -f raw -t none -c 2000 -d 32 $(uri u); do :; done) > /tmp/bench 2>&1 &
    load=$!
    sleep 1
    to_kernel $A
    wait $load || true
    running u
    dd if=$(disk $A 1) of=/tmp/got bs=1M count=4 iflag=direct 2>/dev/null
    [ "$(tr -d '\005' < /tmp/got | wc -c)" = 0 ]
    to_vfio $A
    for _ in $(seq 100); do grep -q 'there is a device again' /tmp/u.err && break; sleep 0.1; done
    for _ in $(seq 50); do io -f raw -c 'read -P 5 0 4M' $(uri u) && break; sleep 0.2; done
    grep 'read 4194304/4194304' /tmp/io
    stop u
}

# A stripe over two devices.
case_stripe() {
    to_vfio $A; to_vfio $H
    node=stripe:64k,vfio:$A/1,vfio:$H/1
    random /tmp/data 512
    polldisk image convert -f raw -O raw /tmp/data $node
    polldisk image compare -f raw -F raw /tmp/data $node
    to_kernel $A; to_kernel $H
    dd if=$(disk $A 1) bs=64k count=1 skip=3 of=/tmp/a iflag=direct 2>/dev/null
    dd if=$(disk $H 1) bs=64k count=1 skip=3 of=/tmp/h iflag=direct 2>/dev/null
    cat /tmp/a /tmp/h > /tmp/both
    dd if=/tmp/data bs=64k count=2 skip=6 of=/tmp/part 2>/dev/null
    cmp /tmp/both /tmp/part
}

# A volume group, an image in a striped volume of it: Linux gets at the files in it without polldisk, by
# LVM, device-mapper and qemu-nbd, and writes one, which polldisk finds.
case_volumes() {
    echo 0123456789abcdef0123456789abcdef > /etc/machine-id
    mkdir -p /etc/lvm /run/lock /run/lvm /var/lock
    cat > /etc/lvm/lvm.conf <<'END'
global { system_id_source = "machineid" event_activation = 0 }
devices { use_devicesfile = 0 obtain_device_list_from_udev = 0 }
activation { udev_sync = 0 udev_rules = 0 }
backup { backup = 0 archive = 0 }
END
    to_vfio $V
    nodes="vfio:$V/1 vfio:$V/2"
    disk=vol:lab/disk@vfio:$V/1,vfio:$V/2
    mkdir /tmp/tree
    random /tmp/tree/one 64
    /bin/mke2fs -q -t ext4 -d /tmp/tree /tmp/fs 16M
    polldisk volume create-group lab $nodes
    polldisk volume create --stripes 2 -L 24M lab/disk $nodes
    polldisk image convert -f raw /tmp/fs $disk

    to_kernel $V
    disk $V 2
    lvm vgck lab
    lvm vgchange -ay lab
    polldisk device list | grep "^$V"
    refused 'lab-disk' polldisk device bind $V
    qemu-img check -f qcow2 /dev/lab/disk
    qemu-nbd -c /dev/nbd0 -f qcow2 /dev/lab/disk
    mount -t ext4 /dev/nbd0 /mnt
    cmp /tmp/tree/one /mnt/one
    random /mnt/two 32
    want=$(sum < /mnt/two)
    umount /mnt
    qemu-nbd -d /dev/nbd0
    for _ in $(seq 100); do lvm vgchange -an lab && break; sleep 0.1; done
    [ ! -e /dev/lab/disk ]

    to_vfio $V
    polldisk volume check $nodes
    polldisk image check $disk
    polldisk image convert -O raw $disk /tmp/back
    qemu-nbd -r -c /dev/nbd0 -f raw /tmp/back
    mount -t ext4 -o ro /dev/nbd0 /mnt
    same "$want" "$(sum < /mnt/two)" "what Linux wrote into the volume"
    cmp /tmp/tree/one /mnt/one
    umount /mnt
    qemu-nbd -d /dev/nbd0
    to_kernel $V
}

# Measured for a moment: requests, none of them failed.
case_bench() {
    to_vfio $A
    polldisk bench device vfio:$A/1 --depth 32 --rw randread --seconds 2 --json | tee /tmp/out
    grep -q '"iops"' /tmp/out
}

# A comparison that reads a drive by polldisk and by the kernel's driver in turns. The drive is as it was, and
# polldisk's again.
case_compare() {
    [ -x /bin/fio ] || { echo "fio is not there: apt-get install fio"; return 77; }
    to_kernel $A
    want=$(sum < $(disk $A 1))
    to_vfio $A
    # As udev and others: whoever finds a new disk looks at it for a while.
    (
        while :; do
            disk=$(disk $A 1 2>/dev/null) || continue
            sleep 2 < $disk
            while [ -e $disk ]; do sleep 0.1; done
        done
    ) &
    looks=$!
    polldisk bench compare --profile latency --quick --rounds 2 --device $A --peer fio --json --out /tmp/page > /tmp/out
    kill $looks
    grep -c '<svg' /tmp/page/report.html
    tr '{' '\n' < /tmp/out | grep '"frontend":"device"' > /tmp/rows
    cut -c 1-200 /tmp/rows
    grep '"peer":"polldisk"' /tmp/rows | grep -q '"workload":"randread"'
    grep '"peer":"fio"' /tmp/rows | grep -q '"workload":"randread"'
    absent '"workload":"randwrite"' /tmp/rows
    # On an image in memory fio does not start: this kernel's tmpfs has no O_DIRECT.
    absent 'kernel driver, io_uring) does not start' /tmp/out
    same vfio-pci "$(driver $A)" "the driver afterwards"
    to_kernel $A
    same "$want" "$(sum < $(disk $A 1))" "what is on the drive"
}

# Under load the device falls silent: its registers and its access to memory are switched off. After
# the deadline of 30 s its function is reset, requests get errors, and it is served again.
case_silent() {
    to_vfio $A
    serve o -f raw vfio:$A/1
    io -f raw -c 'write -P 5 0 4M' -c flush $(uri o)
    (while qemu-img bench -f raw -t none -c 2000 -d 32 $(uri o); do :; done) > /tmp/bench 2>&1 &
    load=$!
    sleep 1
    # The Command register: answers nothing, masters nothing.
    printf '\0\0' | dd of=$PCI/$A/config bs=1 seek=4 conv=notrunc 2>/dev/null
    wait $load || true
    running o
    cat /tmp/o.err
    grep -q 'is overdue: aborting it' /tmp/o.err
    grep -q 'starting again' /tmp/o.err
    for _ in $(seq 100); do io -f raw -c 'read -P 5 0 4M' $(uri o) && break; sleep 0.2; done
    grep 'read 4194304/4194304' /tmp/io
    stop o
}

# Without an IOMMU, nothing goes without the flag.
case_noiommu_refused() {
    to_vfio $A
    [ -e /dev/vfio/noiommu-* ]
    refused "no IOMMU protects memory" polldisk image compare -f raw -F raw vfio:$A/1 vfio:$A/1
    su lab -c "polldisk --unsafe-noiommu image compare -f raw -F raw vfio:$A/1 vfio:$A/1" && return 1
    return 0
}

# Both ways between the kernel and polldisk: 512 and 4096-byte blocks, whole disks.
both_ways() {
    for node in $A/1 $B/3; do
        a=${node%/*}
        to_kernel $a
        d=$(disk $a ${node#*/})
        fill $d
        want=$(sum < $d)
        to_vfio $a
        polldisk -v --unsafe-noiommu image convert -f raw -O raw vfio:$node /tmp/copy
        same "$want" "$(sum < /tmp/copy)" "what the kernel wrote to $node"
        random /tmp/data $(($(stat -c %s /tmp/copy) / 65536))
        polldisk --unsafe-noiommu image convert -f raw -O raw /tmp/data vfio:$node
        polldisk --unsafe-noiommu image compare -f raw -F raw /tmp/data vfio:$node
        to_kernel $a
        same "$(sum < /tmp/data)" "$(sum < $(disk $a ${node#*/}))" "what polldisk wrote to $node"
    done
}
case_noiommu_huge() { both_ways; }
# Ordinary pages alone: each 4 KiB lies somewhere else, queues have one page.
case_noiommu_small() {
    echo 0 > /proc/sys/vm/nr_hugepages
    both_ways
    to_vfio $A
    serve s -f raw --unsafe-noiommu vfio:$A/1
    # Memory is shuffled while it is served: what a device reaches must not move.
    (while :; do echo 1 > /proc/sys/vm/compact_memory; done) &
    churn=$!
    io -f raw -c 'write -P 3 0 4M' -c 'write -P 4 512 70144' -c 'read -P 4 512 70144' \
        -c 'read -P 3 70656 100000' $(uri s)
    qemu-img bench -f raw -t none -c 3000 -d 32 $(uri s)
    io -f raw -c 'read -P 4 512 70144' -c 'read -P 3 1M 3M' $(uri s)
    kill $churn
    stop s
}
case_noiommu_unplug() {
    to_vfio $H
    serve h -f raw --unsafe-noiommu vfio:$H/1
    io -f raw -c 'write -P 5 0 4M' -c flush $(uri h)
    unplug_and_back
}
