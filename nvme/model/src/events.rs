//! Asynchronous events (§5.2): requests that wait for one, events that wait for a request.

use nvme_spec::{
    AsyncEvent, AsyncEventType, CriticalWarning, LogId, Status, StatusCode, notice_event,
    smart_event,
};

use crate::controller::{Controller, deny};
use crate::memory::HostMemory;

/// Distinct events kept while no request is there.
const MAX_PENDING: usize = 32;

/// Changed namespaces that are listed one by one; beyond that the log says "many".
const MAX_CHANGED: usize = 1024;

#[derive(Debug)]
pub(crate) struct Events {
    /// Identifiers of the requests that wait, oldest first.
    requests: Vec<u16>,
    most: usize,
    pending: Vec<AsyncEvent>,
    /// Bit per event type that was reported and whose log page has not been read since.
    masked: u8,
    /// Namespaces that changed since the log page was read; ascending.
    pub(crate) changed: Vec<u32>,
}

impl Events {
    pub(crate) fn new(aerl: u8) -> Events {
        Events {
            requests: Vec::new(),
            most: usize::from(aerl) + 1,
            pending: Vec::new(),
            masked: 0,
            changed: Vec::new(),
        }
    }

    /// Whether there is an event to post.
    pub(crate) fn due(&self) -> bool {
        !self.requests.is_empty() && self.pending.iter().any(|e| self.open(e))
    }

    /// Whether events of this type are reported now.
    fn open(&self, event: &AsyncEvent) -> bool {
        self.masked & (1 << event.kind()) == 0
    }

    pub(crate) fn request(&mut self, cid: u16) -> Result<(), Status> {
        if self.requests.len() >= self.most {
            return Err(deny(StatusCode::AER_LIMIT));
        }
        self.requests.push(cid);
        Ok(())
    }

    /// Takes a request back.
    pub(crate) fn withdraw(&mut self, cid: u16) -> bool {
        let before = self.requests.len();
        self.requests.retain(|&c| c != cid);
        self.requests.len() < before
    }

    fn raise(&mut self, event: AsyncEvent) {
        if self.pending.len() < MAX_PENDING && !self.pending.contains(&event) {
            self.pending.push(event);
        }
    }

    /// The next event with the request that it completes.
    pub(crate) fn take(&mut self) -> Option<(u16, AsyncEvent)> {
        let at = self.pending.iter().position(|e| self.open(e))?;
        if self.requests.is_empty() {
            return None;
        }
        let event = self.pending.remove(at);
        self.masked |= 1 << event.kind();
        Some((self.requests.remove(0), event))
    }

    /// A log page was read without the wish to retain its event.
    pub(crate) fn page_read(&mut self, page: LogId) {
        let kind = match page {
            LogId::Error => AsyncEventType::Error,
            LogId::Smart => AsyncEventType::Smart,
            LogId::ChangedNamespaces => {
                self.changed.clear();
                AsyncEventType::Notice
            }
            _ => return,
        };
        self.masked &= !(1 << kind.code());
    }

    fn namespace_changed(&mut self, nsid: u32) {
        if let Err(at) = self.changed.binary_search(&nsid)
            && self.changed.len() <= MAX_CHANGED
        {
            self.changed.insert(at, nsid);
        }
    }
}

impl<M: HostMemory> Controller<M> {
    fn raise(&mut self, event: AsyncEvent) {
        self.events.raise(event);
        self.unsettled = true;
    }

    pub(crate) fn report_doorbell(&mut self, info: u8) {
        self.raise(AsyncEvent::new(AsyncEventType::Error, info, LogId::Error));
    }

    pub(crate) fn report_namespace(&mut self, nsid: u32) {
        self.events.namespace_changed(nsid);
        if self.features.async_events().namespace() == 1 {
            self.raise(AsyncEvent::new(
                AsyncEventType::Notice,
                notice_event::NAMESPACE_ATTRIBUTE,
                LogId::ChangedNamespaces,
            ));
        }
    }

    /// Raises critical warnings, as bits of [`CriticalWarning`], and reports them to a host that
    /// asked for them.
    pub fn raise_warning(&mut self, bits: u8) {
        self.life.critical_warning |= bits;
        if u32::from(bits) & self.features.async_events().smart() == 0 {
            return;
        }
        let warning = CriticalWarning(bits);
        let info = if warning.spare() == 1 {
            smart_event::SPARE
        } else if warning.temperature() == 1 {
            smart_event::TEMPERATURE
        } else {
            smart_event::RELIABILITY
        };
        self.raise(AsyncEvent::new(AsyncEventType::Smart, info, LogId::Smart));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_of_a_kind_until_its_page_is_read() {
        let mut e = Events::new(1);
        let error = |info| AsyncEvent::new(AsyncEventType::Error, info, LogId::Error);
        e.raise(error(0));
        e.raise(error(0));
        e.raise(error(1));
        assert!(!e.due() && e.take().is_none());
        e.request(7).unwrap();
        e.request(8).unwrap();
        assert_eq!(e.request(9).unwrap_err().code(), StatusCode::AER_LIMIT);
        assert!(e.due());
        assert_eq!(e.take(), Some((7, error(0))));
        assert_eq!(e.take(), None);
        e.page_read(LogId::Smart);
        assert_eq!(e.take(), None);
        e.page_read(LogId::Error);
        assert_eq!(e.take(), Some((8, error(1))));
        assert!(!e.withdraw(8));
        e.request(5).unwrap();
        assert!(e.withdraw(5));
        for info in 0..=255 {
            e.raise(error(info));
        }
        assert_eq!(e.pending.len(), MAX_PENDING);
    }
}
