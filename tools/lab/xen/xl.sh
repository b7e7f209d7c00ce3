# Disks that xl itself gives guests, by the script block-polldisk; sourced by dom0.sh. A second daemon
# watches the kind of backend that libxl uses then.

SCRIPT=/etc/xen/scripts/block-polldisk
xl_disk() { echo "vdev=${1%%=*},access=rw,script=block-polldisk,target=${1#*=}"; }

xl_daemon() {
    mkdir -p /etc/xen/scripts
    cp /block-polldisk $SCRIPT
    chmod 755 $SCRIPT
    printf 'backend = "vbd"\ncontrol = "/run/lab/control.sock"\nstate = "/run/lab/state"\n' > /etc/polldisk-xl.toml
    polldisk serve --config /etc/polldisk-xl.toml > $R/xl-daemon.err 2>&1 &
    echo $! > $R/xl-daemon.pid
    within 30 polldisk ctl --socket /run/lab/control.sock list
}
# No image is left over, and the daemon ends in order.
xl_daemon_ends() {
    within 30 xl_no_image
    kill "$(cat $R/xl-daemon.pid)"
    wait "$(cat $R/xl-daemon.pid)"
    rm $R/xl-daemon.pid
}
xl_no_image() { ! polldisk ctl --socket /run/lab/control.sock list | grep -q '^image'; }
# A guest of xl's has ended, and its disks are let go: NAME
xl_ended() {
    within 60 gone $1 || { echo "guest $1 does not end"; return 1; }
    within 30 xl_no_image
}
# A guest of xl's has booted so often: NAME TIMES
xl_booted() {
    within 120 has_booted $1 $2 || { echo "guest $1 did not boot"; return 1; }
    xl_is $1
}
has_booted() { [ "$(grep -c '^@up' "$(log $1)")" -ge $2 ]; }
# Looks which domain a guest is, and where its console.
xl_is() {
    xl domid $1 > $R/$1.id
    within 60 xenstore-exists /local/domain/$(id $1)/console/tty
    xenstore-read /local/domain/$(id $1)/console/tty > $R/$1.tty
}
# xl fails, and says what the daemon has against the disk: TEXT COMMAND...
xl_refuses() {
    text=$1; shift
    if "$@" > $R/refused 2>&1; then echo "not refused: $*"; return 1; fi
    grep -q "script: .*$text" $R/refused || { cat $R/refused; return 1; }
}

# All that an administrator does with xl.
case_xl() {
    xl_daemon
    image a 128M
    image b 64M
    config a pv 1 ''
    sed -i 's/^on_reboot.*/on_reboot = "restart"/' $R/a.cfg
    sed 's/^name.*/name = "wrong"/' $R/a.cfg > $R/wrong.cfg
    echo "disk = ['$(xl_disk xvda=/images/none.qcow2)']" >> $R/wrong.cfg
    xl_refuses 'none.qcow2.*No such file' xl create -q $R/wrong.cfg
    echo "disk = ['$(xl_disk xvda=$A)']" >> $R/a.cfg
    xl create -q $R/a.cfg
    xl_booted a 1
    ask a 60 disk xvda
    ask a 120 make xvda
    # Another disk comes and goes.
    xl block-attach a "$(xl_disk xvdb=$B)"
    ask a 60 disk xvdb
    ask a 60 churn xvdb
    within 60 has_files a 24
    ask a 60 churned xvdb
    xl block-detach a xvdb
    ask a 60 no_disk xvdb
    judge a $B ' ./file'
    xl_refuses 'none.qcow2.*No such file' xl block-attach a "$(xl_disk xvdb=/images/none.qcow2)"
    # What could not be had stays in the guest's configuration until it is taken out.
    xl block-detach a xvdb
    # The guest reboots: it gets a new domain with the same disk.
    old=$(id a)
    tell a reboot -f
    within 60 gone a
    xl_booted a 2
    [ "$(id a)" != $old ] || { echo "still domain $old"; return 1; }
    ask a 60 disk xvda
    ask a 120 more xvda
    ask a 60 check xvda
    # It is saved, and restored.
    cp "$(log a)" $R/said
    xl save a /images/a.save
    xl_ended a
    judge a $A ' ./first/'
    xl restore /images/a.save
    xl_is a
    ask a 60 check xvda
    xl destroy a
    xl_ended a
    cp $R/said "$(log a)"
    judge a $A ' ./second/'
    xl_daemon_ends
}
