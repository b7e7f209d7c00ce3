//! The images of a disk, on top of each other, whether or not a merge was cut short.

use block::Storage;
use qcow::open::{Chain, ChainOptions, Format, Opened};

/// What an image in a volume of a group is called by those that stand on it.
pub(crate) fn backing(vg: &str, lv: &str) -> String {
    format!("/dev/{vg}/{lv}")
}

/// Opens what a disk is made of: images in these volumes of a group, the uppermost first, which is open
/// already, and is called `top` here. The others are opened by name.
///
/// Each image names one of those below it as its backing file. What is left out in this has been merged
/// into the one that is named, and the repository did not come to know: then the power failed.
///
/// # Errors
/// If an image cannot be opened, or names something else; if the lowest that is named has nothing below it,
/// but stands on others in the repository.
pub fn open_chain<T: Storage>(
    vg: &str,
    lvs: &[String],
    top: T,
    writable: bool,
    open: &mut dyn FnMut(&str) -> qcow::Result<T>,
) -> qcow::Result<Chain<T>> {
    let opened = |storage: T, lv: &str| {
        let name = format!("{vg}/{lv}");
        Opened { storage, path: None, name, id: None }
    };
    let first = lvs.first().map_or("", String::as_str);
    let options = ChainOptions { format: Some(Format::Qcow2), writable, ..Default::default() };
    let mut at = 0;
    let chain = Chain::open(opened(top, first), options, &mut |named| {
        let below = (at + 1..lvs.len()).find(|&n| backing(vg, &lvs[n]) == named.name);
        let Some(n) = below else {
            return Err(qcow::Error::refused(
                &named.named_by,
                format!(
                    "names {} as its backing file, which is not below it in the repository",
                    named.name
                ),
            ));
        };
        at = n;
        Ok(opened(open(&lvs[n])?, &lvs[n]))
    })?;
    match chain.layers.last() {
        Some(lowest) if at + 1 != lvs.len() => Err(qcow::Error::refused(
            &lowest.name,
            "stands on others in the repository, and names no backing file",
        )),
        _ => Ok(chain),
    }
}
