//! [`Life`]: the XenbusState machine of a backend, from the first look at a device to its end.
//!
//! Pure: events go in, actions come out, and whoever owns the device does them in order. One
//! owner per device and one event at a time, so that no two teardowns can race. Decisions are made
//! from the latest state seen, never from a change: watches coalesce, and a guest can toggle its
//! state as fast as it likes. Control threads only.

/// `XenbusState`
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// 1
    Initialising = 1,
    /// 2
    InitWait = 2,
    /// 3
    Initialised = 3,
    /// 4
    Connected = 4,
    /// 5
    Closing = 5,
    /// 6
    Closed = 6,
}

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The image is open and the transport keys are written.
    Ready,
    /// The frontend's state was read; `None` if it or its directory is not there.
    Frontend(Option<u32>),
    /// [`Action::Connect`] is done.
    Connected,
    /// [`Action::Connect`] failed; nothing of it is left, and whoever tried has reported why.
    ConnectFailed,
    /// [`Action::Disconnect`] is done.
    Disconnected,
    /// The `online` key was read.
    Online(bool),
    /// The toolstack wrote 5 over our own state: an unplug.
    AskedToClose,
    /// The size of the disk has changed.
    Resized,
    /// A ring was given up, since the guest broke the protocol.
    Broken,
}

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Write our state; with [`State::Connected`] the device keys in the same transaction.
    Write(State),
    /// Read the frontend's keys, map its rings, bind its ports and serve them. Ends with
    /// [`Event::Connected`] or [`Event::ConnectFailed`].
    Connect,
    /// Take no more requests; those under way end as usual.
    Stop,
    /// Take no more requests, let those under way end, unmap and unbind everything. Ends with
    /// [`Event::Disconnected`]. Until then nothing else happens to the rings.
    Disconnect,
    /// Write the new size, and our state again in the same transaction.
    WriteSize,
    /// Write this text where the toolstack looks for errors.
    Report(&'static str),
    /// The device is over: forget it.
    Remove,
}

/// The rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down,
    GoingUp,
    Up,
    /// Up, but nothing is taken from the rings any more.
    Stopped,
    GoingDown,
}

/// A device's life.
#[derive(Debug)]
pub struct Life {
    own: State,
    link: Link,
    ready: bool,
    online: bool,
    removed: bool,
    /// An unplug was asked for.
    closing: bool,
    /// The frontend as it is now cannot be connected to.
    refused: bool,
    frontend: Option<u32>,
}

impl Life {
    /// A device that the toolstack has just made: both states are 1.
    pub fn new() -> Life {
        Life {
            own: State::Initialising,
            link: Link::Down,
            ready: false,
            online: true,
            removed: false,
            closing: false,
            refused: false,
            frontend: Some(State::Initialising as u32),
        }
    }

    /// Our state as last written.
    pub fn state(&self) -> State {
        self.own
    }

    /// Takes an event; appends what is to be done to `actions`.
    pub fn event(&mut self, event: Event, actions: &mut Vec<Action>) {
        if self.removed {
            return;
        }
        match event {
            Event::Ready => self.ready = true,
            Event::Online(online) => self.online = online,
            Event::Frontend(state) => {
                // From 3 to 4 it goes on with the rings that it has.
                let same = state == self.frontend || (self.frontend, state) == (Some(3), Some(4));
                self.refused &= same;
                self.frontend = state;
            }
            Event::Connected if self.link == Link::GoingUp => {
                self.link = Link::Up;
                // Even if that is what stands there still: the device keys go with it.
                self.own = State::Connected;
                actions.push(Action::Write(State::Connected));
            }
            Event::ConnectFailed if self.link == Link::GoingUp => {
                self.link = Link::Down;
                self.refuse(None, actions);
            }
            Event::Disconnected if self.link == Link::GoingDown => self.link = Link::Down,
            // Of no connection that is under way.
            Event::Connected | Event::ConnectFailed | Event::Disconnected => {}
            Event::AskedToClose => {
                self.closing = true;
                self.own = State::Closing;
                self.stop(actions);
            }
            Event::Resized => {
                if self.link == Link::Up {
                    actions.push(Action::WriteSize);
                }
            }
            Event::Broken => {
                if self.link == Link::Up {
                    self.stop(actions);
                    self.refuse(Some("the guest broke its ring"), actions);
                }
            }
        }
        self.follow(actions);
    }

    fn write(&mut self, state: State, actions: &mut Vec<Action>) {
        if self.own != state {
            self.own = state;
            actions.push(Action::Write(state));
        }
    }

    fn stop(&mut self, actions: &mut Vec<Action>) {
        if self.link == Link::Up {
            self.link = Link::Stopped;
            actions.push(Action::Stop);
        }
    }

    /// Takes the rings down; true when they are.
    fn down(&mut self, actions: &mut Vec<Action>) -> bool {
        if matches!(self.link, Link::Up | Link::Stopped) {
            self.link = Link::GoingDown;
            actions.push(Action::Disconnect);
        }
        self.link == Link::Down
    }

    fn refuse(&mut self, why: Option<&'static str>, actions: &mut Vec<Action>) {
        if !self.refused {
            self.refused = true;
            actions.extend(why.map(Action::Report));
        }
        self.write(State::Closing, actions);
    }

    /// Does what the frontend's present state asks for.
    fn follow(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.link, Link::GoingUp | Link::GoingDown) {
            return;
        }
        match self.frontend {
            Some(1) => {
                // A new life of the guest, whatever became of the last one.
                if self.down(actions) && self.ready && !self.closing {
                    self.write(State::InitWait, actions);
                }
            }
            Some(2) => {
                if self.ready && self.own == State::Initialising {
                    self.write(State::InitWait, actions);
                }
            }
            Some(3 | 4) => {
                if self.closing || self.refused {
                    return;
                }
                if self.link == Link::Stopped {
                    // It closed and came back between two looks: these are new rings.
                    self.down(actions);
                } else if self.link == Link::Down && self.ready {
                    self.link = Link::GoingUp;
                    actions.push(Action::Connect);
                }
            }
            Some(5) => {
                self.stop(actions);
                self.write(State::Closing, actions);
            }
            Some(6) => {
                if self.down(actions) {
                    self.closing = false;
                    self.write(State::Closed, actions);
                    self.remove_unless(self.online, actions);
                }
            }
            None => {
                if self.down(actions) {
                    self.write(State::Closed, actions);
                    self.remove_unless(false, actions);
                }
            }
            Some(_) => {
                self.refuse(Some("the frontend's state is no XenbusState"), actions);
                self.down(actions);
            }
        }
    }

    fn remove_unless(&mut self, stays: bool, actions: &mut Vec<Action>) {
        if !stays {
            self.removed = true;
            actions.push(Action::Remove);
        }
    }
}

impl Default for Life {
    fn default() -> Life {
        Life::new()
    }
}

#[cfg(test)]
mod tests {
    use super::Action::{Connect, Disconnect, Remove, Report, Stop, Write, WriteSize};
    use super::Event::{
        AskedToClose, Broken, ConnectFailed, Connected, Disconnected, Frontend, Online, Ready,
        Resized,
    };
    use super::*;

    type Step = (Event, &'static [Action]);

    const fn fe(state: u32) -> Event {
        Frontend(Some(state))
    }

    const UP: &[Step] = &[
        (Ready, &[Write(State::InitWait)]),
        (fe(3), &[Connect]),
        (Connected, &[Write(State::Connected)]),
        (fe(4), &[]),
    ];

    const BROKEN: &[Action] = &[Stop, Report("the guest broke its ring"), Write(State::Closing)];

    fn play(name: &str, steps: &[&[Step]]) -> Life {
        let mut life = Life::new();
        for (i, (event, expected)) in steps.concat().iter().enumerate() {
            let mut actions = Vec::new();
            life.event(*event, &mut actions);
            assert_eq!(actions, *expected, "{name}, step {i}: {event:?}");
        }
        life
    }

    #[test]
    fn lives() {
        let stories: &[(&str, &[&[Step]])] = &[
            ("normal start", &[UP]),
            (
                "the frontend is quicker than the image",
                &[&[(fe(3), &[]), (Ready, &[Connect]), (Connected, &[Write(State::Connected)])]],
            ),
            (
                "4 without 3 having been seen",
                &[&[
                    (Ready, &[Write(State::InitWait)]),
                    (fe(4), &[Connect]),
                    (Connected, &[Write(State::Connected)]),
                    (fe(4), &[]),
                ]],
            ),
            (
                "clean close, and a new start",
                &[
                    UP,
                    &[
                        (fe(5), &[Stop, Write(State::Closing)]),
                        (fe(5), &[]),
                        (fe(6), &[Disconnect]),
                        (fe(6), &[]),
                        (Disconnected, &[Write(State::Closed)]),
                        (fe(1), &[Write(State::InitWait)]),
                        (fe(3), &[Connect]),
                        (Connected, &[Write(State::Connected)]),
                    ],
                ],
            ),
            (
                "kexec walks the backend back",
                &[
                    UP,
                    &[
                        (fe(5), &[Stop, Write(State::Closing)]),
                        (fe(6), &[Disconnect]),
                        (Disconnected, &[Write(State::Closed)]),
                        (fe(1), &[Write(State::InitWait)]),
                    ],
                ],
            ),
            (
                "closed without closing",
                &[UP, &[(fe(6), &[Disconnect]), (Disconnected, &[Write(State::Closed)])]],
            ),
            (
                "closed and started again while the rings were going down",
                &[
                    UP,
                    &[
                        (fe(6), &[Disconnect]),
                        (fe(1), &[]),
                        (fe(3), &[]),
                        (Disconnected, &[Connect]),
                        (fe(4), &[]),
                        (Connected, &[Write(State::Connected)]),
                    ],
                ],
            ),
            (
                "closing and back between two looks: new rings",
                &[
                    UP,
                    &[
                        (fe(5), &[Stop, Write(State::Closing)]),
                        (fe(3), &[Disconnect]),
                        (Disconnected, &[Connect]),
                        (Connected, &[Write(State::Connected)]),
                    ],
                ],
            ),
            (
                "a guest that starts anew without a word",
                &[UP, &[(fe(1), &[Disconnect]), (Disconnected, &[Write(State::InitWait)])]],
            ),
            (
                "it closes while the rings are going up",
                &[&[
                    (Ready, &[Write(State::InitWait)]),
                    (fe(3), &[Connect]),
                    (fe(6), &[]),
                    (Connected, &[Write(State::Connected), Disconnect]),
                    (Disconnected, &[Write(State::Closed)]),
                ]],
            ),
            (
                "rings that cannot be mapped",
                &[&[
                    (Ready, &[Write(State::InitWait)]),
                    (fe(3), &[Connect]),
                    (ConnectFailed, &[Write(State::Closing)]),
                    (fe(3), &[]),
                    (fe(6), &[Write(State::Closed)]),
                    (fe(1), &[Write(State::InitWait)]),
                    (fe(3), &[Connect]),
                ]],
            ),
            (
                "a ring that is broken",
                &[
                    UP,
                    &[
                        (Broken, BROKEN),
                        (Broken, &[]),
                        (fe(4), &[]),
                        (fe(5), &[]),
                        (fe(6), &[Disconnect]),
                        (Broken, &[]),
                        (Disconnected, &[Write(State::Closed)]),
                        (fe(1), &[Write(State::InitWait)]),
                        (fe(3), &[Connect]),
                        (Connected, &[Write(State::Connected)]),
                        (Broken, BROKEN),
                        (fe(4), &[]),
                        // A new ring at once.
                        (fe(3), &[Disconnect]),
                        (Disconnected, &[Connect]),
                    ],
                ],
            ),
            (
                "unplug by the toolstack",
                &[
                    UP,
                    &[
                        (Online(false), &[]),
                        (AskedToClose, &[Stop]),
                        (fe(4), &[]),
                        (fe(5), &[]),
                        (fe(6), &[Disconnect]),
                        (Disconnected, &[Write(State::Closed), Remove]),
                        (fe(1), &[]),
                    ],
                ],
            ),
            (
                "unplug of a disk that nobody uses",
                &[&[
                    (Ready, &[Write(State::InitWait)]),
                    (Online(false), &[]),
                    (AskedToClose, &[]),
                    (fe(1), &[]),
                    (fe(6), &[Write(State::Closed), Remove]),
                ]],
            ),
            (
                "closed first, then offline",
                &[
                    UP,
                    &[
                        (fe(6), &[Disconnect]),
                        (Disconnected, &[Write(State::Closed)]),
                        (Online(false), &[Remove]),
                    ],
                ],
            ),
            (
                "the directory is gone: the guest was destroyed, or unplugged by force",
                &[
                    UP,
                    &[
                        (Frontend(None), &[Disconnect]),
                        (Frontend(None), &[]),
                        (Disconnected, &[Write(State::Closed), Remove]),
                    ],
                ],
            ),
            (
                "gone while closing",
                &[
                    UP,
                    &[
                        (fe(5), &[Stop, Write(State::Closing)]),
                        (Frontend(None), &[Disconnect]),
                        (Disconnected, &[Write(State::Closed), Remove]),
                    ],
                ],
            ),
            (
                "gone before it was ever there",
                &[&[(Frontend(None), &[Write(State::Closed), Remove])]],
            ),
            (
                "a state that does not exist",
                &[
                    UP,
                    &[
                        (
                            fe(9),
                            &[
                                Report("the frontend's state is no XenbusState"),
                                Write(State::Closing),
                                Disconnect,
                            ],
                        ),
                        (Disconnected, &[]),
                        (fe(9), &[]),
                        (fe(6), &[Write(State::Closed)]),
                    ],
                ],
            ),
            ("resize", &[&[(Resized, &[])], UP, &[(Resized, &[WriteSize])]]),
            ("ends that belong to nothing", &[UP, &[(Disconnected, &[]), (ConnectFailed, &[])]]),
        ];
        for (name, steps) in stories {
            play(name, steps);
        }
    }

    /// Whatever comes in whatever order, rings are taken up and down in turns, and it can end.
    #[test]
    fn any_order_of_events_keeps_the_rings_in_order() {
        let mut seed = 1u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % n
        };
        let mut connects = 0;
        for _ in 0..2000 {
            let mut life = Life::new();
            let (mut up, mut pending, mut removed) = (false, None, false);
            let mut end = false;
            for step in 0..80 {
                let event = match pending {
                    Some(e) if end || random(2) == 0 => {
                        pending = None;
                        match e {
                            Connected if random(4) == 0 => {
                                up = false;
                                ConnectFailed
                            }
                            Disconnected => {
                                up = false;
                                Disconnected
                            }
                            e => e,
                        }
                    }
                    _ if step > 60 => {
                        end = true;
                        Frontend(None)
                    }
                    _ => match random(14) {
                        0 => Ready,
                        1 => Online(random(2) == 0),
                        2 => AskedToClose,
                        3 => Resized,
                        4 => fe(random(12) as u32),
                        n => fe([1, 3, 3, 4, 4, 5, 6][n as usize % 7]),
                    },
                };
                let mut actions = Vec::new();
                life.event(event, &mut actions);
                for a in actions {
                    assert!(!removed, "{a:?} after the end");
                    match a {
                        Connect => {
                            assert!(!up && pending.is_none());
                            up = true;
                            pending = Some(Connected);
                            connects += 1;
                        }
                        Disconnect => {
                            assert!(up && pending.is_none());
                            pending = Some(Disconnected);
                        }
                        Stop | WriteSize => assert!(up && pending.is_none()),
                        Write(State::Connected) => assert!(up),
                        Write(State::Closed | State::InitWait) => assert!(!up),
                        Remove => {
                            assert!(!up && pending.is_none());
                            removed = true;
                        }
                        Write(_) | Report(_) => {}
                    }
                }
            }
            assert!(removed, "it does not end");
        }
        assert!(connects > 2000, "{connects}");
    }
}
