//! `boomtool profile`: which nodes, as whom, under a name.

use clap::Subcommand;

/// What can be done with profiles.
#[derive(Debug, Subcommand)]
pub enum ProfileCommand {
    /// Keep node, client, password and TLS of this line under a name; one of the same name is replaced
    #[command(after_help = "\
The password is asked for, or read from standard input when that is no terminal, unless --token or
BOOMERANG_PASSWORD is given. Profiles are in $XDG_CONFIG_HOME/boomerang/profiles.toml (or
~/.config/boomerang, or where BOOMERANG_PROFILES says), which only its owner may read.

Examples:
  boomtool profile add prod --addr a.internal:9973,b.internal:9973 --client orders --ca ca.pem
  pass show boomerang | boomtool profile add prod --addr a.internal:9973 --tls --default
  boomtool task list --profile prod")]
    Add {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Used from now on by lines that name none
        #[arg(long)]
        default: bool,
    },
    /// Which there are; secrets are not shown
    #[command(after_help = "\
Examples:
  boomtool profile list
  boomtool profile list --json | jq -r .profile")]
    List,
    /// The one that is used by lines that name none
    #[command(after_help = "\
Examples:
  boomtool profile use prod")]
    Use {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Forget one, its password with it
    #[command(after_help = "\
Examples:
  boomtool profile remove prod")]
    Remove {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
}
