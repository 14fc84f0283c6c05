//! `boomtool client`: add, remove, key, revoke-key. For administrators.

use std::io::{self, BufRead};
use std::path::Path;

use serde_json::json;

use super::args::{ClientAdd, ClientCommand};
use super::output::note;
use super::{Context, ToolError};
use boomerang_client::ClientSettings;
use boomerang_task::Invalid;

/// Longer lines are files by mistake.
const PASSWORD_BYTES_MAX: u64 = 4096;

pub(super) async fn run(command: ClientCommand, context: &Context) -> Result<(), ToolError> {
    let output = &context.output;
    match command {
        ClientCommand::Add(args) => {
            let settings = settings(*args, context)?;
            let client_id = settings.client_id.to_string();
            let client = context.connect().await?;
            client.register_client(settings).await?;
            context.hang_up(client).await;
            output.line(
                || format!("{client_id}  registered"),
                || json!({ "client_id": client_id, "result": "registered" }),
            )
        }
        ClientCommand::Remove { client_id } => {
            let client = context.connect().await?;
            client.deregister_client(&client_id).await?;
            context.hang_up(client).await;
            let client_id = client_id.to_string();
            output.line(|| format!("{client_id}  removed"), || json!({ "client_id": client_id, "result": "removed" }))
        }
        ClientCommand::Key { client_id, label } => {
            let client = context.connect().await?;
            let made = client.create_api_key(&client_id, &label).await?;
            context.hang_up(client).await;
            note("keep the key: it is stored nowhere, and not shown again");
            output.line(
                || format!("{}  {}", made.key_id, made.key),
                || json!({ "client_id": client_id.to_string(), "key_id": made.key_id, "key": made.key }),
            )
        }
        ClientCommand::RevokeKey { key_id } => {
            let client = context.connect().await?;
            client.revoke_api_key(&key_id).await?;
            context.hang_up(client).await;
            output.line(|| format!("{key_id}  revoked"), || json!({ "key_id": key_id, "result": "revoked" }))
        }
    }
}

fn settings(args: ClientAdd, context: &Context) -> Result<ClientSettings, ToolError> {
    let own = args.policy.settings()?;
    let limits = args.limits();
    let password = match args.new_password.as_str() {
        "-" => password_from(io::BufReader::new(context.open_input(Path::new("-"))?))?,
        _ => args.new_password,
    };
    if password.is_empty() {
        return Err(Invalid("--new-password: is empty".into()).into());
    }
    Ok(ClientSettings {
        is_admin: args.admin,
        callback: own.callback,
        retry: own.retry,
        dead_letter: own.dead_letters,
        limits,
        ..ClientSettings::new(args.client_id, password)
    })
}

/// The first line, without its end.
pub(super) fn password_from(input: impl BufRead) -> Result<String, ToolError> {
    let mut line = String::new();
    input.take(PASSWORD_BYTES_MAX).read_line(&mut line).map_err(|source| ToolError::file(Path::new("-"), source))?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tests::boomtool;
    use super::*;
    use boomerang_client::fake::{self, Fake};
    use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

    #[tokio::test]
    async fn a_client_gets_a_key_and_loses_it() {
        let fake = Fake::start().await;
        let address = fake.address();
        fake.serve(|request| match request {
            Payload::ClientRegistration(request) => {
                assert_eq!((request.client_id.as_str(), request.password.as_str()), ("orders", "pw"));
                assert!(request.is_admin && request.dlq.is_none() && request.retry.is_none());
                assert_eq!(request.callback.unwrap().endpoint, "h:1");
                let limits = request.limits.unwrap();
                assert_eq!((limits.delay_max_ms, limits.payload_bytes_max), (7 * 24 * 3_600_000, 4096));
                Payload::ClientRegistrationResponse(Default::default())
            }
            Payload::ApiKeyRequest(request) => Payload::ApiKeyResponse(proto::ApiKeyResponse {
                key_id: request.label,
                key: "secret".into(),
                ..Default::default()
            }),
            Payload::ApiKeyRevocation(_) => Payload::ApiKeyRevocationResponse(Default::default()),
            Payload::ClientDeregistration(_) => fake::refused(Status::Unauthorized, "needs an administrator"),
            other => panic!("{other:?}"),
        });
        let run = async |line: &str| boomtool(&format!("{line} --addr {address}")).await;
        let (printed, result) =
            run("client add orders --new-password pw --admin --callback tcp://h:1 --delay-max 7d --payload-max 4KiB")
                .await;
        result.unwrap();
        assert_eq!(printed, "orders  registered\n");
        assert_eq!(run("client key orders --label ci").await.0, "ci  secret\n");
        let printed = run("client key orders --label ci --json").await.0;
        let object: serde_json::Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(object, json!({ "client_id": "orders", "key_id": "ci", "key": "secret" }));
        assert_eq!(run("client revoke-key ci").await.0, "ci  revoked\n");
        let (printed, result) = run("client remove orders").await;
        let error = result.unwrap_err();
        assert_eq!((printed.as_str(), error.exit_code()), ("", 1));
        assert!(error.hint().unwrap().contains("BOOMERANG_PASSWORD"));
    }

    #[test]
    fn a_password_is_one_line() {
        assert_eq!(password_from(&b"pw one\r\nrest"[..]).unwrap(), "pw one");
        assert_eq!(password_from(&b""[..]).unwrap(), "");
    }

    #[tokio::test]
    async fn an_empty_password_is_refused() {
        let printed = boomtool("client add orders --new-password= --addr 127.0.0.1:1").await;
        assert_eq!(printed.1.unwrap_err().exit_code(), 2);
    }
}
