//! [`NodeSpec`]: node strings, one syntax everywhere (docs/cli.md).

use std::path::PathBuf;

use block::MAX_MEMBERS;

use crate::Error;

/// A block node as it is named on a command line.
#[derive(Clone, PartialEq, Debug)]
pub enum NodeSpec {
    /// A file or kernel block device.
    File(PathBuf),
    /// Memory of that many bytes.
    Mem(u64),
    /// A file as namespace 1 of an in-process NVMe controller.
    Model(ModelSpec),
    /// A namespace of an NVMe device that is bound to vfio-pci.
    Vfio(VfioSpec),
    /// A namespace of an NVMe controller behind a vfio-user socket.
    Remote(RemoteSpec),
    /// Stripes of that many bytes over the nodes.
    Stripe(u64, Vec<NodeSpec>),
    /// A volume of a volume group.
    Volume(VolumeSpec),
}

/// The node `vol:VG/LV@NODE,NODE…`.
#[derive(Clone, PartialEq, Debug)]
pub struct VolumeSpec {
    /// Name of the group.
    pub group: String,
    /// Name of the volume.
    pub volume: String,
    /// All devices of the group, in any order.
    pub nodes: Vec<NodeSpec>,
}

/// The node `vfio:DDDD:BB:DD.F/NSID`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VfioSpec {
    /// Where the device is.
    pub address: vfio::Address,
    /// The namespace, from 1 on.
    pub nsid: u32,
}

/// The node `vfio-user:SOCKET/NSID`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteSpec {
    /// Where the server listens.
    pub socket: PathBuf,
    /// The namespace, from 1 on.
    pub nsid: u32,
}

/// The node `model:PATH?…`.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelSpec {
    /// The file behind the namespace.
    pub path: PathBuf,
    /// Capacity in bytes; computed from the image if `None`.
    pub size: Option<u64>,
    /// Block size, 512 or 4096.
    pub lba: u32,
    /// Whether the drive has a volatile write cache.
    pub vwc: bool,
    /// Largest transfer is `4096 << mdts` bytes; 0 for no limit.
    pub mdts: u8,
    /// What goes wrong.
    pub faults: nvme_model::Faults,
}

impl NodeSpec {
    /// Parses a node string.
    ///
    /// # Errors
    /// Says what is wrong with it and what is possible.
    pub fn parse(text: &str) -> Result<NodeSpec, Error> {
        let bad = |why: String| Error::Spec { node: text.to_owned(), why };
        let Some((prefix, rest)) = text.split_once(':') else {
            return Ok(NodeSpec::File(plain(text).map_err(bad)?));
        };
        match prefix {
            "file" => Ok(NodeSpec::File(decode(rest).map_err(bad)?)),
            "mem" => match parse_size(rest) {
                Some(n) if n > 0 && n.is_multiple_of(512) => Ok(NodeSpec::Mem(n)),
                Some(n) => Err(bad(format!("{n} bytes; a positive multiple of 512 is needed"))),
                None => Err(bad(format!("{rest:?} is no size like 64M or 1G"))),
            },
            "model" => ModelSpec::parse(rest).map(NodeSpec::Model).map_err(bad),
            "vfio" => VfioSpec::parse(rest).map(NodeSpec::Vfio).map_err(bad),
            "vfio-user" => RemoteSpec::parse(rest).map(NodeSpec::Remote).map_err(bad),
            "stripe" => stripe(rest).map_err(bad),
            "vol" => VolumeSpec::parse(rest).map(NodeSpec::Volume).map_err(bad),
            _ if prefix.contains('/') => Ok(NodeSpec::File(plain(text).map_err(bad)?)),
            _ => Err(bad(format!(
                "unknown kind {prefix:?}; there are file, mem, model, vfio, vfio-user, stripe and vol \
                 (a file whose name holds a colon is written file: with %3A for it)"
            ))),
        }
    }

    /// The path of a file or model.
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            NodeSpec::File(path) => Some(path),
            NodeSpec::Model(m) => Some(&m.path),
            NodeSpec::Mem(_) | NodeSpec::Vfio(_) | NodeSpec::Remote(_) => None,
            NodeSpec::Stripe(..) | NodeSpec::Volume(_) => None,
        }
    }
}

impl NodeSpec {
    /// As it is written in a list.
    fn listed(&self) -> String {
        let text = match self {
            // What would be taken for another kind, or for a byte's number.
            NodeSpec::File(path) if path.to_string_lossy().contains([':', '%']) => {
                let path = path.to_string_lossy().replace('%', "%25").replace(':', "%3A");
                format!("file:{path}")
            }
            node => node.to_string(),
        };
        text.replace(',', "%2C")
    }
}

impl std::fmt::Display for NodeSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NodeSpec::File(path) => write!(f, "{}", path.display()),
            NodeSpec::Mem(size) => write!(f, "mem:{size}"),
            NodeSpec::Model(m) => write!(f, "model:{}", m.path.display()),
            NodeSpec::Vfio(v) => v.fmt(f),
            NodeSpec::Remote(r) => r.fmt(f),
            NodeSpec::Stripe(size, nodes) => {
                write!(f, "stripe:{size}")?;
                nodes.iter().try_for_each(|n| write!(f, ",{}", n.listed()))
            }
            NodeSpec::Volume(v) => v.fmt(f),
        }
    }
}

impl VolumeSpec {
    fn parse(text: &str) -> Result<VolumeSpec, String> {
        let names = text.split_once('@').and_then(|(names, nodes)| {
            names.split_once('/').map(|(group, volume)| (group, volume, nodes))
        });
        let (group, volume, nodes) = names.ok_or(
            "vol:GROUP/VOLUME@NODE,NODE… is needed, with all devices of the group, like \
             vol:vg0/disk1@/dev/sdb",
        )?;
        volume::check_name("", group).map_err(|e| format!("the group: {e}"))?;
        volume::check_name(group, volume).map_err(|e| e.to_string())?;
        let nodes = list(nodes.split(','), "volumes")?;
        if nodes.len() > MAX_MEMBERS {
            let have = nodes.len();
            return Err(format!("{have} nodes; at most {MAX_MEMBERS} are possible"));
        }
        Ok(VolumeSpec { group: group.to_owned(), volume: volume.to_owned(), nodes })
    }
}

impl std::fmt::Display for VolumeSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let nodes: Vec<String> = self.nodes.iter().map(NodeSpec::listed).collect();
        write!(f, "vol:{}/{}@{}", self.group, self.volume, nodes.join(","))
    }
}

impl VfioSpec {
    fn parse(text: &str) -> Result<VfioSpec, String> {
        let (address, nsid) = text
            .split_once('/')
            .ok_or("a namespace is needed behind the address, like 0000:01:00.0/1")?;
        let address = address.parse().map_err(|e: vfio::Error| e.to_string())?;
        Ok(VfioSpec { address, nsid: namespace_id(nsid)? })
    }
}

impl std::fmt::Display for VfioSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vfio:{}/{}", self.address, self.nsid)
    }
}

impl RemoteSpec {
    fn parse(text: &str) -> Result<RemoteSpec, String> {
        let (socket, nsid) = text
            .rsplit_once('/')
            .ok_or("a namespace is needed behind the socket, like /run/nvme.sock/1")?;
        Ok(RemoteSpec { socket: decode(socket)?, nsid: namespace_id(nsid)? })
    }
}

impl std::fmt::Display for RemoteSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vfio-user:{}/{}", self.socket.display(), self.nsid)
    }
}

impl ModelSpec {
    /// A model over a file, with the usual drive's properties (an Optane's: no volatile cache).
    pub fn new(path: impl Into<PathBuf>) -> ModelSpec {
        ModelSpec {
            path: path.into(),
            size: None,
            lba: 512,
            vwc: false,
            mdts: 5,
            faults: nvme_model::Faults::none(),
        }
    }

    fn parse(text: &str) -> Result<ModelSpec, String> {
        let (path, query) = text.split_once('?').unwrap_or((text, ""));
        let mut spec = ModelSpec::new(decode(path)?);
        for part in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = part.split_once('=').ok_or(format!("{part:?} is no key=value"))?;
            let bad = |allowed: &str| format!("{key}={value}: {allowed}");
            match key {
                "size" => {
                    let n = parse_size(value).filter(|n| *n > 0 && n.is_multiple_of(4096));
                    spec.size = Some(n.ok_or_else(|| bad("a multiple of 4096 like 1G is needed"))?);
                }
                "lba" => {
                    let n = value.parse().ok().filter(|n| matches!(n, 512 | 4096));
                    spec.lba = n.ok_or_else(|| bad("512 and 4096 are possible"))?;
                }
                "vwc" => {
                    spec.vwc = match value {
                        "0" => false,
                        "1" => true,
                        _ => return Err(bad("0 and 1 are possible")),
                    }
                }
                "mdts" => {
                    let n = value.parse().ok().filter(|n| *n <= 16);
                    spec.mdts = n.ok_or_else(|| bad("0 to 16 are possible"))?;
                }
                "fault" => spec.faults = value.parse().map_err(|e| format!("fault: {e}"))?,
                _ => {
                    return Err(format!(
                        "unknown option {key:?}; there are size, lba, vwc, mdts and fault"
                    ));
                }
            }
        }
        Ok(spec)
    }
}

/// The identifier of a namespace. Digits alone: no sign. 0 and all ones name no single one.
pub(crate) fn namespace_id(text: &str) -> Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(n) if digits && n != 0 && n != u32::MAX => Ok(n),
        _ => Err(format!("{text:?} is no namespace; they count from 1")),
    }
}

/// The nodes that something lies on, each one device. A comma within a node is written %2C.
fn list<'t>(
    parts: impl Iterator<Item = &'t str>,
    what: &'static str,
) -> Result<Vec<NodeSpec>, String> {
    let node = |part: &str| {
        let node = NodeSpec::parse(&part.replace("%2C", ",").replace("%2c", ","));
        let below = match node.map_err(|e| e.to_string())? {
            NodeSpec::Stripe(..) => "stripes",
            NodeSpec::Volume(_) => "volumes",
            node => return Ok(node),
        };
        Err(format!("{what} over {below} are not possible"))
    };
    parts.map(node).collect()
}

/// The node `stripe:SIZE,NODE,NODE…`.
fn stripe(text: &str) -> Result<NodeSpec, String> {
    let mut parts = text.split(',');
    let size = parts.next().unwrap_or("");
    let bytes = parse_size(size).ok_or_else(|| format!("{size:?} is no size like 64k"))?;
    let nodes = list(parts, "stripes")?;
    if !(2..=MAX_MEMBERS).contains(&nodes.len()) {
        return Err(format!("stripe:SIZE,NODE,NODE…: 2 to {MAX_MEMBERS} nodes are needed"));
    }
    Ok(NodeSpec::Stripe(bytes, nodes))
}

/// A path as it stands.
fn plain(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("the path is empty".to_owned()) } else { Ok(text.into()) }
}

/// A path with %XX for bytes that would mean something else.
fn decode(text: &str) -> Result<PathBuf, String> {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        if b != b'%' {
            bytes.push(b);
            continue;
        }
        let hex = tail.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        let byte = hex.and_then(|h| u8::from_str_radix(h, 16).ok()).filter(|&b| b != 0);
        bytes.push(byte.ok_or("a % must be followed by two hexadecimal digits, not 00")?);
        rest = &tail[2..];
    }
    if bytes.is_empty() {
        return Err("the path is empty".to_owned());
    }
    Ok(std::ffi::OsString::from_vec(bytes).into())
}

/// A size in bytes: a number, or one with k, M, G, T or P (powers of 1024).
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    let n: u64 = digits.parse().ok()?;
    n.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> NodeSpec {
        NodeSpec::File(path.into())
    }

    #[test]
    fn paths() {
        assert_eq!(NodeSpec::parse("a.qcow2").unwrap(), file("a.qcow2"));
        assert_eq!(NodeSpec::parse("/a/b c").unwrap(), file("/a/b c"));
        assert_eq!(NodeSpec::parse("./a:b").unwrap(), file("./a:b"));
        assert_eq!(NodeSpec::parse("file:/a%3ab%25").unwrap(), file("/a:b%"));
        for bad in ["", "file:", "file:%0", "file:%zz", "file:a%00b", "a:b", "json:{}", "nbd://x"] {
            assert!(NodeSpec::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory() {
        assert_eq!(NodeSpec::parse("mem:64M").unwrap(), NodeSpec::Mem(64 << 20));
        for bad in ["mem:", "mem:0", "mem:100", "mem:1X", "mem:99999999P"] {
            assert!(NodeSpec::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn stripes() {
        let spec = NodeSpec::parse("stripe:64k,mem:1M,model:/x?fault=lost:op=read%2Cnth=2,a%2cb");
        let Ok(NodeSpec::Stripe(65536, nodes)) = spec else { panic!("{spec:?}") };
        assert_eq!((&nodes[0], &nodes[2]), (&NodeSpec::Mem(1 << 20), &file("a,b")));
        let NodeSpec::Model(m) = &nodes[1] else { panic!("no model") };
        assert_eq!(m.faults.len(), 1);
        for bad in ["", "64k", "64k,a", "x,a,b", "4k,a,", "4k,a,z:b", "4k,a,stripe:4k%2Cb%2Cc"] {
            assert!(NodeSpec::parse(&format!("stripe:{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes() {
        let text = "vol:vg-0/a.b@/x,model:/y,vfio:0000:0a:00.1/2,vfio-user:/s/1,mem:512,z%2Cz";
        let spec = NodeSpec::parse(text).unwrap();
        let NodeSpec::Volume(v) = &spec else { panic!("no volume") };
        assert_eq!((v.group.as_str(), v.volume.as_str(), v.nodes.len()), ("vg-0", "a.b", 6));
        assert_eq!((&v.nodes[0], &v.nodes[5]), (&file("/x"), &file("z,z")));
        assert_eq!((spec.to_string().as_str(), spec.path()), (text, None));
        // Names that would be something else in a list are written so that they are read again.
        for path in ["a:b", "/a,b:c", "100%", "%2C", "/%3A,", "a@b/c"] {
            let nodes = vec![file(path), file("/d")];
            let (group, volume) = ("g".to_owned(), "v".to_owned());
            let spec = NodeSpec::Volume(VolumeSpec { group, volume, nodes: nodes.clone() });
            assert_eq!(NodeSpec::parse(&spec.to_string()).unwrap(), spec, "{spec}");
            let spec = NodeSpec::Stripe(4096, nodes);
            assert_eq!(NodeSpec::parse(&spec.to_string()).unwrap(), spec, "{spec}");
        }
        for (bad, why) in [
            ("", "is needed"),
            ("g/v", "is needed"),
            ("g@a", "is needed"),
            ("g/v@", "empty"),
            ("g/v@a,", "empty"),
            ("/v@a", "group"),
            ("g/@a", "no name"),
            ("g/v/w@a", "no name"),
            ("g/..@a", "no name"),
            ("g/v_rimage_0@a", "meaning"),
            ("-g/v@a", "no name"),
            ("g/v@nbd:x", "unknown kind"),
            ("g/v@stripe:4k%2Ca%2Cb", "volumes over stripes"),
            ("g/v@vol:g/v@a", "volumes over volumes"),
        ] {
            let e = NodeSpec::parse(&format!("vol:{bad}")).unwrap_err().to_string();
            assert!(e.contains(why), "{bad}: {e}");
        }
        let many = format!("vol:g/v@{}", ["a"; 33].join(","));
        assert!(NodeSpec::parse(&many).unwrap_err().to_string().contains("33 nodes"));
        let e = NodeSpec::parse("stripe:4k,a,vol:g/v@b").unwrap_err().to_string();
        assert!(e.contains("stripes over volumes"), "{e}");
    }

    #[test]
    fn devices() {
        let text = "vfio:0000:0a:00.1/12";
        let NodeSpec::Vfio(v) = NodeSpec::parse(text).unwrap() else { panic!("no device") };
        assert_eq!((v.address.bus, v.nsid), (10, 12));
        assert_eq!(v.to_string(), text);
        for bad in [
            "",
            "0000:0a:00.1",
            "0000:0a:00.1/",
            "0000:0a:00.1/0",
            "0000:0a:00.1/+1",
            "0a:00.1/1",
            "0000:0a:00.1/4294967295",
            "0000:0a:00.1/4294967296",
            "0000:0a:00.1/1/2",
            "/1",
        ] {
            assert!(NodeSpec::parse(&format!("vfio:{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn remotes() {
        let text = "vfio-user:/run/a.sock/12";
        let NodeSpec::Remote(r) = NodeSpec::parse(text).unwrap() else { panic!("no remote") };
        assert_eq!((r.socket.to_str(), r.nsid), (Some("/run/a.sock"), 12));
        assert_eq!(r.to_string(), text);
        let NodeSpec::Remote(r) = NodeSpec::parse("vfio-user:a%2fb%3F/1").unwrap() else {
            panic!("no remote")
        };
        assert_eq!(r.socket.to_str(), Some("a/b?"));
        for bad in ["", "1", "/1", "a", "a/", "a/0", "a/+1", "a/-1", "a/4294967295", "a/1x"] {
            assert!(NodeSpec::parse(&format!("vfio-user:{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn models() {
        let NodeSpec::Model(m) =
            NodeSpec::parse("model:/x?size=1G&lba=4096&vwc=1&mdts=3&fault=lost:op=write,nth=9")
                .unwrap()
        else {
            panic!("no model")
        };
        assert_eq!((m.size, m.lba, m.vwc, m.mdts), (Some(1 << 30), 4096, true, 3));
        assert_eq!(m.faults.len(), 1);
        for bad in ["?lba=1024", "?vwc=2", "?size=5", "?mdts=17", "?x=1", "?lba", "?fault=zz"] {
            let e = NodeSpec::parse(&format!("model:/x{bad}")).unwrap_err().to_string();
            assert!(e.starts_with("node \"model:/x?"), "{e}");
        }
    }
}
