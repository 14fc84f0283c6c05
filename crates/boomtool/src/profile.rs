//! Profiles: nodes, client, password and TLS under a name, in a file that only its owner may read, so that nobody needs
//! passwords in arguments.
//!
//! What a line says itself wins. A profile that the line names wins over the environment, and the environment over the
//! profile that is used when a line names none.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use boomerang_task::{ClientId, Invalid};
use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::args::Global;
use super::args::profile::ProfileCommand;
use super::client::password_from;
use super::{Context, ToolError};

/// Names another file.
const VARIABLE: &str = "BOOMERANG_PROFILES";
const FOLDER: &str = "boomerang";
const FILE: &str = "profiles.toml";

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profiles {
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<String>,
    #[serde(default)]
    profiles: BTreeMap<String, Profile>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    addr: Vec<String>,
    client: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    password: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(default)]
    tls: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cert: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<PathBuf>,
}

/// What a line has not said, from the profile it names or the one that is used when it names none.
pub(super) fn fill(global: &mut Global, matches: &ArgMatches) -> Result<(), ToolError> {
    let path = path();
    let Some(path) = path.filter(|path| global.profile.is_some() || path.exists()) else {
        return match &global.profile {
            Some(name) => Err(unknown(name)),
            None => Ok(()),
        };
    };
    fill_from(&path, global, matches)
}

fn fill_from(path: &Path, global: &mut Global, matches: &ArgMatches) -> Result<(), ToolError> {
    let Profiles { default, mut profiles } = read(path)?;
    let Some(name) = global.profile.clone().or(default) else { return Ok(()) };
    let profile = profiles.remove(&name).ok_or_else(|| unknown(&name))?;
    let is_named = matches.value_source("profile") == Some(ValueSource::CommandLine);
    let said = |id: &str| match matches.value_source(id) {
        Some(ValueSource::CommandLine) => true,
        Some(ValueSource::EnvVariable) => !is_named,
        _ => false,
    };
    if !said("addr") {
        global.addr = profile.addr;
    }
    // Who is calling is one thing, however many flags say it.
    if !["client", "password", "token"].into_iter().any(said) {
        global.client = profile.client.parse().map_err(ToolError::Usage)?;
        (global.password, global.token) = (profile.password, profile.token);
    }
    if !["tls", "ca", "cert"].into_iter().any(said) {
        (global.tls, global.ca, global.cert, global.key) = (profile.tls, profile.ca, profile.cert, profile.key);
    }
    Ok(())
}

fn unknown(name: &str) -> ToolError {
    Invalid::new(format!("--profile: there is no '{name}'; 'boomtool profile list' shows which there are")).into()
}

pub(super) fn run(command: ProfileCommand, context: &Context) -> Result<(), ToolError> {
    let path = path().ok_or_else(|| ToolError::Undone(format!("no home folder is known: {VARIABLE} names a file")))?;
    run_on(&path, command, context)
}

fn run_on(path: &Path, command: ProfileCommand, context: &Context) -> Result<(), ToolError> {
    let mut all = read(path)?;
    let done = |name: &str, what: &str| {
        context.output.line(|| format!("{name}  {what}"), || json!({ "profile": name, "result": what }))
    };
    match command {
        ProfileCommand::Add { name, default } => {
            all.profiles.insert(name.clone(), asked(context)?);
            if default {
                all.default = Some(name.clone());
            }
            write(path, &all)?;
            done(&name, "kept")
        }
        ProfileCommand::List => all.profiles.iter().try_for_each(|(name, profile)| {
            let is_default = all.default.as_ref() == Some(name);
            let by = if profile.token.is_some() { "API key" } else { "password" };
            let tls = profile.tls || profile.ca.is_some() || profile.cert.is_some();
            let (addr, client) = (profile.addr.join(","), &profile.client);
            context.output.line(
                || {
                    let (tls, default) = (if tls { "TLS" } else { "-" }, if is_default { "  default" } else { "" });
                    format!("{name}  {addr}  {client}  {by}  {tls}{default}")
                },
                || json!({ "profile": name, "addr": profile.addr, "client": client, "by": by, "tls": tls, "default": is_default }),
            )
        }),
        ProfileCommand::Use { name } => {
            if !all.profiles.contains_key(&name) {
                return Err(unknown(&name));
            }
            all.default = Some(name.clone());
            write(path, &all)?;
            done(&name, "used from now on")
        }
        ProfileCommand::Remove { name } => {
            all.profiles.remove(&name).ok_or_else(|| unknown(&name))?;
            all.default = all.default.filter(|default| *default != name);
            write(path, &all)?;
            done(&name, "removed")
        }
    }
}

/// What this line says, as a profile.
fn asked(context: &Context) -> Result<Profile, ToolError> {
    let Global { addr, client, password, token, tls, ca, cert, key, .. } = context.global.clone();
    let password = match (&token, password) {
        (Some(_), _) => String::new(),
        (None, password) if !password.is_empty() => password,
        (None, _) => ask_password(&client, context)?,
    };
    let absolute = |path: Option<PathBuf>| path.map(|path| std::path::absolute(&path).unwrap_or(path));
    let (ca, cert, key) = (absolute(ca), absolute(cert), absolute(key));
    Ok(Profile { addr, client: client.to_string(), password, token, tls, ca, cert, key })
}

fn ask_password(client: &ClientId, context: &Context) -> Result<String, ToolError> {
    if context.interactive {
        let asked = rpassword::prompt_password(format!("password of {client}: "));
        return asked.map_err(|source| ToolError::file(Path::new("-"), source));
    }
    password_from(io::BufReader::new(context.open_input(Path::new("-"))?))
}

/// Where they are; `None` for whoever has no home.
fn path() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = || variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    variable(VARIABLE).or_else(|| Some(config()?.join(FOLDER).join(FILE)))
}

fn read(path: &Path) -> Result<Profiles, ToolError> {
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Profiles::default()),
        Err(error) => return Err(ToolError::file(path, error)),
    };
    let mode = file.metadata().map_err(|error| ToolError::file(path, error))?.mode();
    if mode & 0o077 != 0 {
        let shown = path.display();
        let text = format!("{shown} holds passwords, and others may read or write it: chmod 600 {shown}");
        return Err(ToolError::Undone(text));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| ToolError::file(path, error))?;
    toml::from_str(&text).map_err(|error| ToolError::Undone(format!("{}: {}", path.display(), error.message())))
}

/// All of it, or what was there before.
fn write(path: &Path, profiles: &Profiles) -> Result<(), ToolError> {
    let written = || {
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let beside = path.with_extension(format!("{}.new", std::process::id()));
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(toml::to_string(profiles).expect("plain fields").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(beside, path)
    };
    written().map_err(|error| ToolError::Undone(format!("cannot write {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::args::Cli;
    use super::super::tests::prepare;
    use super::*;

    /// What a line is run with.
    fn filled(path: &Path, line: &str) -> Result<Global, ToolError> {
        let words = ["boomtool"].into_iter().chain(line.split_whitespace());
        let (mut cli, matches) = Cli::read_with_matches(words).unwrap();
        fill_from(path, &mut cli.global, &matches)?;
        Ok(cli.global)
    }

    fn run(path: &Path, line: &str) -> (String, Result<(), ToolError>) {
        let (command, context, printed) = prepare(line);
        let super::super::args::Command::Profile(command) = command else { panic!("{line}") };
        let result = run_on(path, command, &context);
        (printed.text(), result)
    }

    #[test]
    fn a_profile_says_what_a_line_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config/boomerang/profiles.toml");
        let add = "profile add prod --addr a:1,b:2 --client orders --password secret --ca ca.pem";
        run(&path, add).1.unwrap();
        run(&path, "profile add keyed --addr c:3 --token key --tls").1.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let global = filled(&path, "task list").unwrap();
        assert_eq!(global.addr, ["127.0.0.1:9973"], "none is used by itself");
        let global = filled(&path, "task list --profile prod").unwrap();
        assert_eq!(
            (global.addr, global.client.as_str(), &*global.password),
            (vec!["a:1".into(), "b:2".into()], "orders", "secret")
        );
        assert!(global.ca.unwrap().is_absolute());
        let global = filled(&path, "task list --profile prod --addr d:4 --client admin").unwrap();
        assert_eq!(
            (global.addr, &*global.password),
            (vec!["d:4".to_owned()], ""),
            "another's password is not given away"
        );
        run(&path, "profile use keyed").1.unwrap();
        let global = filled(&path, "task list").unwrap();
        assert_eq!((global.token.as_deref(), global.tls, global.ca), (Some("key"), true, None));
        let (shown, listed) = run(&path, "profile list");
        listed.unwrap();
        assert!(shown.contains("keyed  c:3  admin  API key  TLS  default") && !shown.contains("secret"), "{shown}");
        run(&path, "profile remove keyed").1.unwrap();
        assert_eq!(filled(&path, "task list").unwrap().token, None);
        for line in ["profile remove keyed", "profile use keyed"] {
            assert!(run(&path, line).1.unwrap_err().to_string().contains("there is no 'keyed'"), "{line}");
        }
        assert!(filled(&path, "task list --profile none").unwrap_err().to_string().contains("there is no 'none'"));
    }

    #[test]
    fn a_file_that_others_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profiles.toml");
        run(&path, "profile add a --password p").1.unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(filled(&path, "task list").unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "default = 3").unwrap();
        assert!(filled(&path, "task list").unwrap_err().to_string().contains("profiles.toml: "));
    }
}
