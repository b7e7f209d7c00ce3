//! `polldisk completions` and `polldisk man`: what shells and readers are told of the command line, made
//! from its definition. The packages hold what these print.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::Cli;

/// Print what completes this command line in a shell.
#[derive(clap::Args)]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Write the manual pages, one of each command.
#[derive(clap::Args)]
pub(crate) struct Man {
    /// The folder for them, which must be there.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// `polldisk completions`.
pub(crate) fn completions(args: &Completions) -> anyhow::Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "polldisk", &mut text);
    let mut out = std::io::stdout().lock();
    std::io::Write::write_all(&mut out, &text).context(crate::output::STDOUT)?;
    Ok(0)
}

/// `polldisk man`.
pub(crate) fn man(args: &Man) -> anyhow::Result<u8> {
    write_pages(&args.folder)?;
    Ok(0)
}

fn write_pages(folder: &Path) -> anyhow::Result<()> {
    let written = clap_mangen::generate_to(Cli::command(), folder);
    written.with_context(|| folder.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Commands that people see and that hold no others, as "polldisk image check".
    fn leaves(command: &clap::Command, path: &str, into: &mut Vec<String>) {
        let mut inner = command.get_subcommands().filter(|c| !c.is_hide_set()).peekable();
        if inner.peek().is_none() {
            into.push(path.to_owned());
        }
        inner.for_each(|c| leaves(c, &format!("{path} {}", c.get_name()), into));
    }

    #[test]
    fn each_command_has_a_page_and_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        write_pages(folder.path()).unwrap();
        let mut commands = Vec::new();
        leaves(&Cli::command(), "polldisk", &mut commands);
        assert!(commands.iter().any(|c| c == "polldisk image check"), "{commands:?}");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "polldisk", &mut text);
            let text = String::from_utf8(text).unwrap();
            for command in &commands {
                let last = command.rsplit(' ').next().unwrap();
                assert!(text.contains(last), "{shell}: {command}");
            }
        }
        for command in &commands {
            let page = folder.path().join(format!("{}.1", command.replace(' ', "-")));
            let page = std::fs::read_to_string(&page).expect(command);
            assert!(page.contains(".SH SYNOPSIS"), "{command}: {page}");
        }
    }
}
