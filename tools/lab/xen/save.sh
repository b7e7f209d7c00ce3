# Saving and restoring guests in the Xen lab; sourced by dom0.sh.

# Starts a guest again from what was saved of it, in a new domain: NAME FILE. It goes on with its next
# command.
restore() {
    # Whether xenconsoled would begin the guest's log anew or go on in it, both come to the same so.
    cat "$(log $1)" >> $R/$1.said
    rm "$(log $1)"
    xl restore -p $2
    xl domid $1 > $R/$1.id
    if [ $BACKEND = qdisk ]; then
        xl unpause $1
    else
        [ $BACKEND = polldisk ] || qemu_start $1
        for d in $(cat $R/$1.disks); do publish $1 ${d%%=*} ${d#*=}; done
        xl unpause $1
    fi
    within 60 xenstore-exists /local/domain/$(id $1)/console/tty
    xenstore-read /local/domain/$(id $1)/console/tty > $R/$1.tty
    within 60 in_state $(front $1 xvda) 4
}

# A guest is saved while it writes, and restored: what it had in flight is done once more, by its driver,
# and it goes on. Twice, so that what was restored can be saved, too.
case_save() {
    image a 128M
    start a pv 1 '' xvda=$A
    ask a 60 disk xvda
    ask a 60 churn xvda
    for round in 1 2; do
        within 60 has_files a 5
        old=$(id a)
        xl save a /images/a.save
        ended a
        qemu-img check -q -f qcow2 $A
        restore a /images/a.save
        [ "$(id a)" != $old ] || { echo "still domain $old"; return 1; }
        rm /images/a.save
    done
    within 60 has_files a 5
    ask a 60 churned xvda
    off a
    cat "$(log a)" >> $R/a.said
    mv $R/a.said "$(log a)"
    judge a $A
}
