# Guests of the Xen lab, as dom0 sees them; sourced by dom0.sh. A guest runs guest.sh and takes
# commands on its console.
R=/run/lab

log() { echo /var/log/xen/guest-$1.log; }
id() { cat $R/$1.id; }
# The configuration of a guest: NAME TYPE VCPUS OPTIONS (of the guest's disk driver, "a=1,b=2" or "";
# "none": no driver).
config() {
    cat > $R/$1.cfg <<END
name = "$1"
type = "$2"
kernel = "/guest.kernel"
ramdisk = "/guest.initramfs"
memory = 192
vcpus = $3
cpus = "1"
vnc = 0
nographic = 1
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
extra = "console=hvc0 loglevel=1 panic=-1 blkfront=$4"
END
    # Without this a PVH guest asks for RDTSCP, which does not work under TCG.
    [ $2 = pv ] || echo 'tsc_mode = "native"' >> $R/$1.cfg
    echo 0 > $R/$1.count
}
# Waits for a guest that was just started.
booted() { # NAME
    within 120 grep -q '^@up' "$(log $1)" || { echo "guest $1 did not boot"; return 1; }
    xenstore-read /local/domain/$(id $1)/console/tty > $R/$1.tty
}
# Gives a guest a command and goes on: NAME COMMAND...
tell() {
    guest=$1; shift
    n=$(($(cat $R/$guest.count) + 1))
    echo $n > $R/$guest.count
    echo "$n $*" > "$(cat $R/$guest.tty)"
}
# Waits for the end of the last command; fails if that failed: NAME SECONDS
told() {
    n=$(cat $R/$1.count)
    within $2 grep -q "^@end $n " "$(log $1)" || { echo "guest $1 did not end command $n"; return 1; }
    grep -q "^@end $n 0" "$(log $1)" || { echo "guest $1: command $n failed"; return 1; }
}
ask() { # NAME SECONDS COMMAND...
    who=$1 time=$2; shift 2
    tell $who "$@"
    told $who $time || { echo "it was: $*"; return 1; }
}
gone() { ! xenstore-exists /local/domain/$(id $1); }
# Waits until a guest has ended, and its disks are let go: NAME
ended() {
    within 60 gone $1 || { echo "guest $1 does not end"; return 1; }
    release $1
}
off() {
    tell $1 poweroff -f
    ended $1
}

files() { grep -c '^HASH ' "$(log $1)"; }
has_files() { [ "$(files $1)" -ge $2 ]; }

# An image that nobody has any more, judged by QEMU's tools and dom0's kernel: clean, its file system
# too, and each file as the guest said (lines "HASH SUM NAME"): NAME IMAGE [PATTERN [dirty]]. PATTERN
# chooses lines; `dirty` is for a file system that nobody unmounted.
judge() {
    qemu-img check -q -f qcow2 $2
    qemu-img convert -f qcow2 -O raw $2 /images/judge.raw
    if [ "$4" = dirty ]; then mount -o loop /images/judge.raw /mnt && umount /mnt; fi
    e2fsck -f -n /images/judge.raw > $R/fsck 2>&1 || { cat $R/fsck; return 1; }
    tr -d '\r' < "$(log $1)" | sed -n 's/^HASH \(.*\) \(.*\)$/\1  \2/p' | grep -- "${3:-.}" > $R/sums
    [ "$(wc -l < $R/sums)" -ge 5 ] || { echo "no list of files from $1"; return 1; }
    mount -o loop,ro /images/judge.raw /mnt
    (cd /mnt && sha256sum -c $R/sums) > $R/checked 2>&1 || { grep -v ': OK$' $R/checked | head -5; return 1; }
    umount /mnt
    rm /images/judge.raw
    echo "$(wc -l < $R/sums) files are right in $2"
}
