//! What the journal and the snapshot keep of a configuration: its keys and values, but no comments and no secrets.

use toml::{Table, Value};

/// The keys whose values are secrets.
const SECRETS: [&str; 2] = ["token", "password"];
/// What stands in their place: a value is needed where there was one.
const HIDDEN: &str = "hidden";

/// The same configuration, for whoever only wants to know what it does.
pub(super) fn without_secrets(text: &str) -> Result<String, String> {
    let mut table = text.parse::<Table>().map_err(|error| error.message().to_owned())?;
    hide(&mut table);
    toml::to_string(&table).map_err(|error| error.to_string())
}

fn hide(table: &mut Table) {
    for (key, value) in table.iter_mut() {
        match value {
            Value::String(text) if SECRETS.contains(&key.as_str()) => HIDDEN.clone_into(text),
            Value::Table(table) => hide(table),
            Value::Array(values) => values.iter_mut().filter_map(Value::as_table_mut).for_each(hide),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Settings;

    #[test]
    fn what_is_kept_means_the_same_and_has_no_secrets() {
        let text = "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"s3cret\"\n\
                    [[source]]\nkind = \"mqtt\"\nurl = \"mqtt://h\"\npassword = \"s3cret\"\ntopics = [\"#\"] # s3cret\n\
                    stream = \"s\"\n[source.map]\ndevice = \"topic:0\"\nz = \"/z\"\na = \"/a\"\n[stream.s.fields]\nz = { type = \"text\" }\n\
                    a = { type = \"int64\" }\n[stream.s.window.5m]\nsize = \"5m\"\n";
        let settings = Settings::parse(text).unwrap();
        assert!(!settings.text.contains("s3cret"), "{}", settings.text);
        let kept = Settings::parse_kept(settings.version, &settings.text).unwrap();
        assert_eq!((kept.version, &kept.text), (settings.version, &settings.text));
        let stream = |settings: &Settings| format!("{:?}", settings.stream);
        assert_eq!(stream(&kept), stream(&settings), "the order of fields is that of the columns");
    }
}
