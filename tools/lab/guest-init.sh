#!/bin/busybox sh
# First process of the lab's guest. The kernel command line says lab=write, lab=find or lab=make.
#   /modules   kernel modules to load, in order
#   /manifest  sha256sum lines of files that must be on the disk
#   /links     NAME TAB TARGET of links that must be there
# Each line for the harness starts with LAB. "LAB FAIL" anywhere, or no "LAB DONE", is a failure.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

say() { echo "LAB $*"; }
fail() { say "FAIL $*"; }
since() { cut -d' ' -f1 /proc/uptime; }
end() {
    dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|BUG:|Oops|blocked for more' | head -5 > /tmp/bad
    [ -s /tmp/bad ] && fail "kernel: $(cat /tmp/bad)"
    say "DONE at $(since) s"
    poweroff -f
}

for module in $(cat /modules); do insmod "$module" || fail "insmod $module"; done
for _ in $(seq 100); do [ -b /dev/vda ] && break; sleep 0.1; done
case "$(cat /proc/cmdline)" in *lab=make*)
    # By its path: the shell knows a mke2fs of its own.
    LD_LIBRARY_PATH=/lib /bin/mke2fs -q -t ext4 /dev/vda || fail "mke2fs" ;;
esac
if ! mount -t ext4 /dev/vda /mnt; then
    fail "mount"
    end
fi
cd /mnt
say "mounted at $(since) s"

case "$(cat /proc/cmdline)" in *lab=make*)
    # What the changes below need.
    mkdir -p usr/sbin usr/include special
    cp /lib/* /lib64/* /bin/busybox usr/sbin || fail "cp"
    for i in $(seq 300); do echo "header $i" > usr/include/$i.h; done
    truncate -s 64M "special/sparse islands" "special/sparse odd islands" || fail "truncate"
    sync
    cd / && umount /mnt && mount -t ext4 /dev/vda /mnt || fail "mount again"
    cd /mnt
    find usr special -type f -exec sha256sum {} + > /manifest ;;
esac

# Every file against its hash, every link against its target.
sha256sum -c /manifest > /tmp/sums 2>&1 || fail "hashes: $(grep -v ': OK$' /tmp/sums | head -5)"
say "$(grep -c ': OK$' /tmp/sums) files right at $(since) s"
while IFS='	' read -r name target; do
    [ "$(readlink "$name")" = "$target" ] || fail "link $name"
done < /links
case "$(cat /proc/cmdline)" in *lab=find*)
    [ -e /mnt/usr/include ] && fail "a deleted folder is back"
    [ -e /mnt/new/renamed ] || fail "a renamed file is gone"
    end ;;
esac

# Changes of every kind: copies, random data, small files, sync writes, writes into the middle of a
# file and into holes, deletions with discards.
mkdir new
cp -a usr/sbin new/copy || fail "copy"
dd if=/dev/urandom of=new/random bs=64k count=256 2>/dev/null || fail "dd random"
for i in $(seq 0 63); do
    dd if=/dev/urandom of=new/forced bs=4k seek="$i" count=1 conv=notrunc,fsync 2>/dev/null ||
        fail "dd with fsync"
done
mkdir new/small
for i in $(seq 200); do echo "small file $i" > new/small/$i; done
sync
for i in 1 50 777 4001 9999; do
    dd if=/dev/urandom of="special/sparse islands" bs=4k seek=$i count=3 conv=notrunc 2>/dev/null ||
        fail "dd into a hole"
    dd if=/dev/urandom of="special/sparse odd islands" bs=512 seek=$((i * 5 + 1)) count=3 \
        conv=notrunc,fsync 2>/dev/null || fail "dd into the middle"
done
rm -r usr/include new/small/1?? || fail "rm"
sync
fstrim /mnt || fail "fstrim"
# Space that was just discarded is written again.
dd if=/dev/urandom of=new/after-trim bs=64k count=128 2>/dev/null || fail "dd after trim"
echo done > new/file && mv new/file new/renamed || fail "rename"
find new special/sparse* -type f -exec sha256sum {} + | while read -r line; do say "HASH $line"; done
say "written at $(since) s"
sync
cd /
umount /mnt || fail "umount"
end
