# HVM guests of the Xen lab; sourced by dom0.sh. Their firmware reads the disk through a controller that
# QEMU emulates, until the guest's kernel takes that away and its own driver (xen-blkfront) comes. So an
# image has two users, and QEMU is one over NBD.

# An image that firmware boots from: a file system with a boot loader, and the guests' kernel: NAME SIZE
bootable() {
    truncate -s $2 /images/boot.raw
    # The boot loader does not know all that is new in ext4.
    /bin/mke2fs -q -t ext4 -O ^64bit,^metadata_csum /images/boot.raw
    mount -o loop /images/boot.raw /mnt
    mkdir /mnt/boot
    cp /guest.kernel /mnt/boot/kernel
    cp /guest.initramfs /mnt/boot/initramfs
    cat > /mnt/boot/extlinux.conf <<END
default linux
label linux
    kernel kernel
    append initrd=initramfs console=hvc0 loglevel=1 panic=-1 boot=first
END
    extlinux --install /mnt/boot
    umount /mnt
    qemu-img convert -f raw -O qcow2 -o cluster_size=64k /images/boot.raw /images/$1.qcow2
    rm /images/boot.raw
}

# The configuration of a guest with this image as its disk: NAME VDEV IMAGE
config_hvm() {
    cat > $R/$1.cfg <<END
name = "$1"
type = "hvm"
firmware_override = "/hvmloader"
bios = "seabios"
bios_path_override = "/seabios"
disk = ['$(xl_disk "$2={\"node\":\"$3\",\"nbd\":\"$R/$1.nbd\"}")']
memory = 256
vcpus = 1
cpus = "1"
vga = "none"
vnc = 0
nographic = 1
tsc_mode = "native"
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
END
    echo 0 > $R/$1.count
}
# Starts a guest from its disk and waits until it has booted: NAME IMAGE. Firmware drives the IDE
# controller, which xl has emulated for a disk up to xvdd, without DMA: that takes hours here. So the
# controller is one for SCSI.
start_hvm() {
    config_hvm $1 xvde $2
    cat >> $R/$1.cfg <<END
device_model_args_hvm = [
    "-drive", "file=nbd:unix:$R/$1.nbd,format=raw,if=none,id=disk,cache=writeback",
    "-device", "lsi53c895a,id=scsi", "-device", "scsi-hd,drive=disk,bus=scsi.0"
]
END
    xl create -q -p $R/$1.cfg
    nbd_clients 1
    xl unpause $1
    xl_booted $1 1
}
nbd_clients() { polldisk ctl --socket /run/lab/control.sock list | grep "^image .* by $1 NBD clients"; }

# A guest boots by its firmware from what its driver then writes to, and does so again from what that
# has made of it.
case_hvm() {
    xl_daemon
    bootable a 192M
    # The emulated disk that xl makes of itself is read over NBD.
    config_hvm a xvda $A
    xl create -q -p $R/a.cfg
    xl_is a
    nbd_clients 1
    xl destroy a
    xl_ended a
    start_hvm a $A
    ask a 60 disk xvde
    ask a 60 grep -q boot=first /proc/cmdline
    # Nobody has the emulated disk any more.
    within 30 nbd_clients 0
    ask a 120 more xvde
    ask a 60 check xvde
    # What a client of NBD reads is what the driver has written.
    qemu-img convert -f raw -O qcow2 nbd:unix:$R/a.nbd /images/nbd.qcow2
    judge a /images/nbd.qcow2
    # The kernel moves to another place of the disk.
    ask a 60 'mount -t ext4 /dev/xvde /mnt; cd /mnt/boot; cp kernel new; mv new kernel'
    ask a 60 'sed -i s/boot=first/boot=second/ /mnt/boot/extlinux.conf; umount /mnt'
    tell a poweroff -f
    xl_ended a
    judge a $A ' ./second/'
    start_hvm b $A
    ask b 60 disk xvde
    ask b 60 grep -q boot=second /proc/cmdline
    within 30 nbd_clients 0
    ask b 60 'mount -t ext4 /dev/xvde /mnt; cd /mnt; rm -r second; fill third; sums xvde; cd /; umount /mnt'
    ask b 60 check xvde
    tell b poweroff -f
    xl_ended b
    judge b $A
    xl_daemon_ends
}
