#!/bin/busybox sh
# First process of a guest in the Xen lab. Loads the disk driver with the options of the command line
# (blkfront=a=1,b=2; not at all if they are "none") and then does what dom0 writes to its console: lines "NUMBER COMMANDS". Says
#   @up                      ready
#   @end NUMBER STATUS       after each command
#   HASH SUM NAME            a file that must be on the disk, with its SHA-256
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
stty -echo

for word in $(cat /proc/cmdline); do
    case $word in blkfront=*) options=$(echo "${word#blkfront=}" | tr , ' ') ;; esac
done
for m in $(cat /modules); do
    case $m in
        *blkfront*) [ "$options" = none ] || insmod $m $options ;;
        *) insmod $m ;;
    esac || echo "@bad insmod $m"
done

# Waits for a disk: VDEV
disk() {
    for _ in $(seq 300); do [ -b /dev/$1 ] && return 0; usleep 100000; done
    echo "no disk $1"
    return 1
}
no_disk() {
    for _ in $(seq 300); do [ -b /dev/$1 ] || return 0; usleep 100000; done
    echo "disk $1 is still there"
    return 1
}
# The size in bytes: VDEV BYTES
size() {
    for _ in $(seq 300); do [ "$(blockdev --getsize64 /dev/$1)" = $2 ] && return 0; usleep 100000; done
    echo "the size of $1 is $(blockdev --getsize64 /dev/$1), not $2"
    return 1
}
# Nothing in the kernel's messages tells of trouble. On a busy host a CPU may stand still for so long
# that the kernel speaks of a lockup.
quiet() {
    ! dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|BUG:|Oops|WARNING:|blocked for more' | grep -v lockup
}
random() { dd if=/dev/urandom "$@" 2>/dev/null; }
# Makes files of all kinds in a folder: FOLDER
fill() {
    mkdir $1
    random of=$1/big bs=1M count=4
    random of=$1/odd bs=4097 count=99
    for i in $(seq 0 15); do random of=$1/forced bs=4k seek=$i count=1 conv=notrunc,fsync; done
    for i in $(seq 12); do echo "$1 file $i" > $1/small$i; done
    truncate -s 8M $1/holes
    random of=$1/holes bs=512 seek=4001 count=3 conv=notrunc,fsync
    random of=$1/holes bs=64k seek=77 count=1 conv=notrunc
    cp /bin/busybox $1/copied
    random of=$1/deleted bs=64k count=20
    sync
    rm $1/deleted
}
# A new file system on a disk, with files on it: VDEV
make() {
    LD_LIBRARY_PATH=/lib /bin/mke2fs -q -t ext4 /dev/$1
    mkdir -p /make
    mount -t ext4 /dev/$1 /make
    cd /make
    fill first
    fstrim /make
    # Freed and trimmed space is used again.
    random of=first/again bs=64k count=24
    sums $1
    cd /
    umount /make
}
# More files on a file system that may have lost its guest: VDEV
more() {
    mount -t ext4 /dev/$1 /mnt
    cd /mnt
    fill second
    sums $1
    cd /
    umount /mnt
}
# Says what is in this folder of a disk, and remembers it: VDEV
sums() {
    find . -type f -exec sha256sum {} + > /tmp/sums.$1
    while read -r sum name; do echo "HASH $sum $name"; done < /tmp/sums.$1
}
# Checks a file system, and that it has what was remembered, read from the disk: VDEV
check() {
    mkdir -p /check
    e2fsck -f -n /dev/$1 > /tmp/fsck 2>&1 || { cat /tmp/fsck; return 1; }
    echo 3 > /proc/sys/vm/drop_caches
    mount -t ext4 /dev/$1 /check
    cd /check
    sha256sum -c /tmp/sums.$1 > /tmp/checked || { grep -v ': OK$' /tmp/checked; return 1; }
    cd /
    umount /check
    quiet
}
# Writes files, one after the other, and says each that was forced to the disk: VDEV [MOST]
churn() {
    LD_LIBRARY_PATH=/lib /bin/mke2fs -q -t ext4 /dev/$1
    mount -t ext4 /dev/$1 /mnt
    (
        for i in $(seq ${2:-400}); do
            [ -e /tmp/enough ] && break
            random of=/tmp/new bs=4k count=$((i % 37 + 1))
            dd if=/tmp/new of=/mnt/file$i bs=64k conv=fsync 2>/dev/null || { echo "@bad file$i"; break; }
            sum=$(sha256sum < /tmp/new | cut -d' ' -f1)
            echo "$sum  ./file$i" >> /tmp/sums.$1
            echo "HASH $sum ./file$i"
            usleep 100000
        done
        touch /tmp/ended
    ) &
}
# Ends that, with all that was written found on the disk: VDEV
churned() {
    touch /tmp/enough
    for _ in $(seq 300); do [ -e /tmp/ended ] && break; usleep 100000; done
    [ -e /tmp/ended ]
    umount /mnt
    check $1
}
# Reads and writes a disk past the cache, at most eight requests at a time, and says how many requests that
# were: VDEV BLOCKS-OF-EACH
load() {
    [ -e /tmp/load ] || random of=/tmp/load bs=4k count=1000
    before=$(answered $1)
    for i in 0 1 2 3; do
        dd if=/dev/$1 of=/dev/null bs=4k skip=$((i * 1000)) count=$2 iflag=direct 2>/dev/null &
        dd if=/tmp/load of=/dev/$1 bs=4k seek=$((i * 1000)) count=$2 oflag=direct conv=notrunc 2>/dev/null &
    done
    wait
    echo "REQUESTS $(($(answered $1) - before))"
}
answered() { awk '{ print $1 + $5 }' /sys/block/$1/stat; }

echo "@up $(uname -r)"
while read -r number commands; do
    ( set -e; eval "$commands" )
    echo "@end $number $?"
done
