//! A task's name and labels: for people, and to find it again.

use serde::{Deserialize, Serialize};

use super::Invalid;

const TEXT_BYTES_MAX: usize = 128;
const LABELS_MAX: usize = 16;

/// Checked, and labels in the order of their keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tags {
    name: Option<String>,
    labels: Vec<(String, String)>,
}

impl Tags {
    /// An empty name is none.
    pub fn new(name: &str, labels: impl IntoIterator<Item = (String, String)>) -> Result<Self, Invalid> {
        let mut labels: Vec<(String, String)> = labels.into_iter().collect();
        labels.sort();
        if labels.len() > LABELS_MAX {
            return Err(Invalid::new(format!("labels: {} of them, the limit is {LABELS_MAX}", labels.len())));
        }
        if labels.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(Invalid::new("labels: two have the same key"));
        }
        check("name", name)?;
        for (key, value) in &labels {
            check("labels", key)?;
            check("labels", value)?;
            if key.is_empty() || key.contains('=') {
                return Err(Invalid::new(format!("labels: the key '{key}' is empty or has a '='")));
            }
        }
        Ok(Self { name: (!name.is_empty()).then(|| name.to_owned()), labels })
    }

    /// What the client calls its task.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Keys and values, in the order of the keys.
    pub fn labels(&self) -> &[(String, String)] {
        &self.labels
    }

    /// About what they take.
    pub fn bytes(&self) -> usize {
        let labels: usize = self.labels.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
        labels + self.name.as_ref().map_or(0, String::len)
    }

    /// Whether there is neither a name nor a label.
    pub fn is_empty(&self) -> bool {
        self.name.is_none() && self.labels.is_empty()
    }
}

fn check(field: &str, text: &str) -> Result<(), Invalid> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(Invalid::new(format!("{field}: {} bytes, the limit is {TEXT_BYTES_MAX}", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(Invalid::new(format!("{field}: contains control characters")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_ordered_and_checked() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let tags = Tags::new("nightly", [pair("b", "2"), pair("a", "1")]).unwrap();
        assert_eq!(tags.labels(), [pair("a", "1"), pair("b", "2")]);
        assert_eq!(tags.name(), Some("nightly"));
        assert!(Tags::new("", []).unwrap().is_empty());
        for wrong in [pair("", "x"), pair("a=b", "x"), pair("a", "x\n"), pair("a", &"x".repeat(200))] {
            assert!(Tags::new("", [wrong.clone()]).is_err(), "{wrong:?}");
        }
        assert!(Tags::new("", [pair("a", "1"), pair("a", "2")]).is_err());
        assert!(Tags::new("", (0..17).map(|n| pair(&n.to_string(), ""))).is_err());
    }
}
