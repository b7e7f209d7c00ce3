//! The stand-in keeps the rules that the crate rests on, whoever breaks them.

use crate::abi::GrantRef;
use crate::fake::Host;
use nix::errno::Errno;

fn refs(n: u32) -> Vec<GrantRef> {
    (0..n).map(|i| GrantRef { domid: 3, reference: 8 + i }).collect()
}

#[test]
fn entries_are_mapped_once_and_whole() {
    let host = Host::new();
    let guest = host.guest(3, 4);
    (0..4).for_each(|i| guest.grants().grant(8 + i, i, false));
    let device = host.gntdev();
    let kernel = device.kernel();
    let index = kernel.map(&refs(3)).unwrap();
    assert_eq!(kernel.mmap(index, 2).unwrap_err(), Errno::EINVAL);
    assert_eq!(kernel.mmap(index + 4096, 2).unwrap_err(), Errno::EINVAL);
    let memory = kernel.mmap(index, 3).unwrap();
    assert_eq!(kernel.mmap(index, 3).unwrap_err(), Errno::EINVAL, "once");
    assert_eq!(kernel.unmap(index, 2), Err(Errno::ENOENT));
    assert_eq!(kernel.unmap(index + 4096, 2), Err(Errno::ENOENT));
    let second = kernel.map(&refs(1)).unwrap();
    assert_eq!(second, index + 3 * 4096);
    drop(memory);
    assert_eq!((kernel.unmap(index, 3), kernel.unmap(index, 3)), (Ok(()), Err(Errno::ENOENT)));
    kernel.unmap(second, 1).unwrap();
    assert_eq!(host.mapped(), 0);
    assert_eq!(kernel.map(&refs(65_537)), Err(Errno::EINVAL));
}

#[test]
#[should_panic(expected = "unmapped first")]
fn a_range_goes_before_its_entry() {
    let host = Host::new();
    host.guest(3, 1).grants().grant(8, 0, false);
    let device = host.gntdev();
    let index = device.kernel().map(&refs(1)).unwrap();
    let _memory = device.kernel().mmap(index, 1).unwrap();
    let _ = device.kernel().unmap(index, 1);
}
