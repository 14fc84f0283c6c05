//! Who may use the cluster. Only in group 0. Touches: client, api key.

use super::command::{PutApiKey, PutClient};
use super::{Effect, Reply, Shard};
use crate::store::StoreError;
use crate::store::keys::Key;
use crate::store::rows::ClientRow;
use crate::task::{ClientId, GroupId};

impl Shard<'_, '_> {
    fn client(&self, client: &ClientId) -> Result<Option<ClientRow>, StoreError> {
        assert_eq!(self.group, GroupId::CLUSTER, "clients live in the cluster's group");
        self.rows.get("a client", &Key::client(client.as_str()))
    }

    /// A client of that name keeps its keys and its age.
    pub(super) fn put_client(&mut self, put: PutClient) -> Result<Reply, StoreError> {
        let known = self.client(&put.client)?;
        if known.is_some() && put.only_if_absent {
            return Ok(Reply::Exists);
        }
        let (since_ms, api_keys) = known.map_or((self.meta.now_ms, Vec::new()), |row| (row.since_ms, row.api_keys));
        let key = Key::client(put.client.as_str());
        self.effects.push(Effect::ClientChanged { client: put.client.clone() });
        self.rows.put(key, &put.row(since_ms, api_keys));
        Ok(Reply::Stored)
    }

    /// Its keys go with it; its tasks stay and fire.
    pub(super) fn remove_client(&mut self, client: &ClientId) -> Result<Reply, StoreError> {
        let Some(row) = self.client(client)? else { return Ok(Reply::NotFound) };
        for key_id in &row.api_keys {
            self.rows.delete(Key::api_key(key_id));
        }
        self.rows.delete(Key::client(client.as_str()));
        self.effects.push(Effect::ClientChanged { client: client.clone() });
        Ok(Reply::Stored)
    }

    pub(super) fn put_api_key(&mut self, put: PutApiKey) -> Result<Reply, StoreError> {
        let Some(mut row) = self.client(&put.client)? else { return Ok(Reply::NotFound) };
        row.api_keys.push(put.key_id.clone());
        self.rows.put(Key::client(put.client.as_str()), &row);
        self.rows.put(Key::api_key(&put.key_id.clone()), &put.row(self.meta.now_ms));
        Ok(Reply::Stored)
    }

    pub(super) fn remove_api_key(&mut self, key_id: &str) -> Result<Reply, StoreError> {
        let key = Key::api_key(key_id);
        let Some(found) = self.rows.get::<crate::store::rows::ApiKeyRow>("an api key", &key)? else {
            return Ok(Reply::NotFound);
        };
        self.rows.delete(key);
        if let Some(mut row) = self.client(&found.client)? {
            row.api_keys.retain(|known| known != key_id);
            self.rows.put(Key::client(found.client.as_str()), &row);
        }
        self.effects.push(Effect::KeyRevoked { key_id: key_id.to_owned() });
        Ok(Reply::Stored)
    }
}
