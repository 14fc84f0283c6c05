//! Values of EDN, as far as a history has them: numbers without a sign, texts, keywords, truths, lists and maps.
//!
//! Knows nothing of histories. Whatever it does not know it refuses, and it never panics: files come from anywhere.

#[derive(Debug, PartialEq)]
pub(super) enum Value {
    Number(u128),
    Truth(bool),
    Text(String),
    Word(String),
    List(Vec<Value>),
    Map(Vec<(Value, Value)>),
}

const SOON: &str = "it ends too soon";
/// Maps within maps are not deeper than this in what we write.
const DEPTH_MAX: usize = 8;

struct Reader<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Reader<'t> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Result<char, String> {
        let next = self.peek().ok_or(SOON)?;
        self.at += next.len_utf8();
        Ok(next)
    }

    /// Commas are blanks in EDN.
    fn skip_blanks(&mut self) {
        while self.peek().is_some_and(|next| next.is_whitespace() || next == ',') {
            self.at += self.peek().map_or(0, char::len_utf8);
        }
    }

    fn while_in(&mut self, wanted: impl Fn(char) -> bool) -> &'t str {
        let from = self.at;
        while self.peek().is_some_and(&wanted) {
            self.at += self.peek().map_or(0, char::len_utf8);
        }
        &self.text[from..self.at]
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        if depth > DEPTH_MAX {
            return Err("too many brackets within each other".to_owned());
        }
        self.skip_blanks();
        match self.peek() {
            Some('{') => self.map(depth),
            Some('[') => {
                self.next()?;
                Ok(Value::List(self.until(']', depth)?))
            }
            Some('"') => self.string(),
            Some(':') => {
                self.next()?;
                Ok(Value::Word(self.while_in(is_word).to_owned()))
            }
            Some(digit) if digit.is_ascii_digit() => self.number(),
            Some(other) => {
                let at = self.at;
                match self.while_in(is_word) {
                    "true" => Ok(Value::Truth(true)),
                    "false" => Ok(Value::Truth(false)),
                    "" => Err(format!("'{other}' at column {} belongs to nothing", at + 1)),
                    word => Err(format!("'{word}' at column {} is nothing that is written here", at + 1)),
                }
            }
            None => Err(SOON.to_owned()),
        }
    }

    fn number(&mut self) -> Result<Value, String> {
        let digits = self.while_in(|next| next.is_ascii_digit());
        let number = digits.parse().map_err(|_| format!("{digits} is too large"))?;
        if self.peek() == Some('N') {
            self.next()?;
        }
        Ok(Value::Number(number))
    }

    fn map(&mut self, depth: usize) -> Result<Value, String> {
        self.next()?;
        let mut values = self.until('}', depth)?.into_iter();
        let mut pairs = Vec::with_capacity(values.len() / 2);
        while let Some(key) = values.next() {
            pairs.push((key, values.next().ok_or("a key has no value")?));
        }
        Ok(Value::Map(pairs))
    }

    fn until(&mut self, end: char, depth: usize) -> Result<Vec<Value>, String> {
        let mut values = Vec::new();
        loop {
            self.skip_blanks();
            if self.peek() == Some(end) {
                self.next()?;
                return Ok(values);
            }
            values.push(self.value(depth + 1)?);
        }
    }

    fn string(&mut self) -> Result<Value, String> {
        self.next()?;
        let mut text = String::new();
        loop {
            match self.next()? {
                '"' => return Ok(Value::Text(text)),
                '\\' => text.push(self.escaped()?),
                other => text.push(other),
            }
        }
    }

    fn escaped(&mut self) -> Result<char, String> {
        Ok(match self.next()? {
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let mut code = 0;
                for _ in 0..4 {
                    let digit = self.next()?;
                    code =
                        code * 16 + digit.to_digit(16).ok_or_else(|| format!("'{digit}' is no hexadecimal digit"))?;
                }
                char::from_u32(code).ok_or_else(|| format!("\\u{code:04x} is no character"))?
            }
            same @ ('"' | '\\') => same,
            other => return Err(format!("'\\{other}' means nothing")),
        })
    }
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '-'
}

/// The map that a line is.
pub(super) fn parse(line: &str) -> Result<Value, String> {
    let mut reader = Reader { text: line, at: 0 };
    let value = reader.value(0)?;
    reader.skip_blanks();
    if reader.at < line.len() {
        return Err(format!("something follows at column {}", reader.at + 1));
    }
    Ok(value)
}

/// A map with keywords as keys, and what is wanted of it.
pub(super) struct Fields<'v>(&'v [(Value, Value)]);

impl<'v> Fields<'v> {
    pub fn of(value: &'v Value) -> Result<Self, String> {
        match value {
            Value::Map(pairs) => Ok(Self(pairs)),
            other => Err(format!("a map belongs here, not {other:?}")),
        }
    }

    pub fn find(&self, key: &str) -> Option<&'v Value> {
        self.0.iter().find(|(word, _)| matches!(word, Value::Word(word) if word == key)).map(|(_, value)| value)
    }

    pub fn get(&self, key: &str) -> Result<&'v Value, String> {
        self.find(key).ok_or_else(|| format!(":{key} is missing"))
    }

    pub fn number<T: TryFrom<u128>>(&self, key: &str) -> Result<T, String> {
        match self.get(key)? {
            Value::Number(number) => T::try_from(*number).map_err(|_| format!(":{key} is too large: {number}")),
            other => Err(format!(":{key} is no number: {other:?}")),
        }
    }

    pub fn maybe_number<T: TryFrom<u128>>(&self, key: &str) -> Result<Option<T>, String> {
        self.find(key).map(|_| self.number(key)).transpose()
    }

    pub fn text(&self, key: &str) -> Result<&'v str, String> {
        text(self.get(key)?).map_err(|why| format!(":{key}: {why}"))
    }

    pub fn word(&self, key: &str) -> Result<&'v str, String> {
        match self.get(key)? {
            Value::Word(word) => Ok(word),
            other => Err(format!(":{key} is no keyword: {other:?}")),
        }
    }

    pub fn truth(&self, key: &str) -> Result<bool, String> {
        match self.get(key)? {
            Value::Truth(truth) => Ok(*truth),
            other => Err(format!(":{key} is neither true nor false: {other:?}")),
        }
    }

    pub fn map(&self, key: &str) -> Result<Fields<'v>, String> {
        Fields::of(self.get(key)?).map_err(|why| format!(":{key}: {why}"))
    }

    pub fn texts(&self, key: &str) -> Result<Vec<String>, String> {
        match self.get(key)? {
            Value::List(values) => values.iter().map(|value| Ok(text(value)?.to_owned())).collect(),
            other => Err(format!(":{key} is no list: {other:?}")),
        }
    }

    /// A map of texts to texts.
    pub fn pairs(&self) -> Result<Vec<(String, String)>, String> {
        self.0.iter().map(|(name, value)| Ok((text(name)?.to_owned(), text(value)?.to_owned()))).collect()
    }
}

fn text(value: &Value) -> Result<&str, String> {
    match value {
        Value::Text(text) => Ok(text),
        other => Err(format!("a text belongs here, not {other:?}")),
    }
}
