//! `polldisk image bitmap`.

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches};
use node::{NodeSpec, OpenOptions, open_source};
use qcow::edit::{self, BitmapAction};
use qcow::open::Format;

use super::{only_qcow2, open_for_change, refuse_special, usage};

/// Change persistent bitmaps, which record what parts of the disk are written to. Actions are done
/// in the order in which they are given, all or none.
#[derive(Args)]
pub(crate) struct Bitmap {
    #[command(flatten)]
    actions: Actions,
    /// The image's format: qcow2.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// Bytes that one bit stands for, with --add: a power of two from 512 to 2G. By default the
    /// cluster size, but at least 4k and at most 64k.
    #[arg(short, long, value_parser = super::size)]
    granularity: Option<u64>,
    /// Take the bitmaps to be merged from this image.
    #[arg(short = 'b', long, value_name = "IMAGE", value_parser = super::node)]
    source_file: Option<NodeSpec>,
    /// The format of that image: qcow2.
    #[arg(short = 'F', long, requires = "source_file", value_parser = crate::args::format)]
    source_format: Option<Format>,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
    /// The bitmap's name.
    #[arg(value_name = "BITMAP")]
    bitmap: String,
}

/// Options that may come several times, and whose order counts.
struct Actions(Vec<(&'static str, String)>);

/// Names and what is said about them.
const ACTIONS: [(&str, &str); 5] = [
    ("add", "Add the bitmap: empty, and it records writes"),
    ("remove", "Remove the bitmap"),
    ("clear", "Clear all bits"),
    ("enable", "Have the bitmap record writes from now on"),
    ("disable", "Have the bitmap record nothing from now on"),
];
const MERGE: &str = "merge";

impl Args for Actions {
    fn augment_args(mut cmd: clap::Command) -> clap::Command {
        for (name, help) in ACTIONS {
            let flag = Arg::new(name).long(name).help(help).action(ArgAction::Append);
            cmd = cmd.arg(flag.num_args(0).default_missing_value(""));
        }
        let merge = Arg::new(MERGE).long(MERGE).value_name("SOURCE").action(ArgAction::Append);
        cmd.arg(merge.help("Set the bits that bitmap SOURCE has, too"))
    }

    fn augment_args_for_update(cmd: clap::Command) -> clap::Command {
        Self::augment_args(cmd)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Actions, clap::Error> {
        let mut found = Vec::new();
        for name in ACTIONS.map(|a| a.0).into_iter().chain([MERGE]) {
            let at = matches.indices_of(name).unwrap_or_default();
            let values = matches.get_many::<String>(name).unwrap_or_default();
            found.extend(at.zip(values).map(|(at, value)| (at, name, value.clone())));
        }
        found.sort_by_key(|f| f.0);
        Ok(Actions(found.into_iter().map(|f| (f.1, f.2)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Bitmap {
    /// What is to be done, in order.
    fn actions(&self) -> anyhow::Result<Vec<BitmapAction>> {
        let given = |name: &str| self.actions.0.iter().any(|a| a.0 == name);
        if self.actions.0.is_empty() {
            return usage(
                "say what to do: --add, --remove, --clear, --enable, --disable or --merge",
            );
        }
        if self.granularity.is_some() && !given("add") {
            return usage("--granularity is for --add");
        }
        if self.source_file.is_some() && !given(MERGE) {
            return usage("--source-file is for --merge");
        }
        let action = |(name, value): &(&str, String)| match *name {
            "add" => BitmapAction::Add { granularity: self.granularity },
            "remove" => BitmapAction::Remove,
            "clear" => BitmapAction::Clear,
            "enable" => BitmapAction::Enable,
            "disable" => BitmapAction::Disable,
            _ => BitmapAction::Merge(value.clone()),
        };
        Ok(self.actions.0.iter().map(action).collect())
    }
}

/// Does it.
pub(crate) fn run(args: &Bitmap) -> anyhow::Result<()> {
    only_qcow2(args.format)?;
    only_qcow2(args.source_format.unwrap_or(Format::Qcow2))?;
    let actions = args.actions()?;
    let name = args.image.to_string();
    // First the one that is only read: should both be the same file, the lock says so.
    let mut source = match &args.source_file {
        Some(spec) => {
            refuse_special(spec)?;
            Some((spec.to_string(), open_source(spec, &OpenOptions::read(Format::Qcow2))?))
        }
        None => None,
    };
    let mut image = open_for_change(&args.image)?;
    let from = source.as_mut().map(|(name, source)| (name.as_str(), source));
    edit::change_bitmap(&mut image, &name, &args.bitmap, &actions, from)?;
    image.close()?;
    if let Some((_, source)) = source {
        source.close()?;
    }
    Ok(())
}
