//! Fields that have another name than their senders give them: `[stream.traffic.alias] speed = "avg_speed"` in the configuration.
//!
//! A batch keeps the names that it came with; in the WAL, too. Where it becomes hot, and where its table is made, each field
//! has the name of the alias, unless the batch has that one as well, or another field before it that takes it. So old and new edges fill one column, and an alias that
//! is set or taken away later holds for what comes from then on.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::Schema;
use wire::FieldName;
use wire::schema::StreamField;

/// From the senders' names to ours, of one stream.
pub type Aliases = BTreeMap<FieldName, FieldName>;

/// Fields under the names that they have here.
pub(crate) fn fields<'a>(aliases: Option<&Aliases>, fields: &'a [StreamField]) -> Cow<'a, [StreamField]> {
    let Some(aliases) = aliases.filter(|aliases| !aliases.is_empty()) else { return Cow::Borrowed(fields) };
    let names = aliased(aliases, fields.iter().map(|field| field.name.as_str()));
    let renamed = |(field, alias): (&StreamField, Option<&FieldName>)| match alias {
        Some(alias) => StreamField { name: alias.clone(), kind: field.kind },
        None => field.clone(),
    };
    fields.iter().zip(names).map(renamed).collect()
}

/// Rows with their columns under the names that they have here.
pub(crate) fn rows(aliases: &Aliases, rows: &RecordBatch) -> RecordBatch {
    let schema = rows.schema_ref();
    let names = aliased(aliases, schema.fields().iter().map(|field| field.name().as_str()));
    if names.iter().all(Option::is_none) {
        return rows.clone();
    }
    let renamed = schema.fields().iter().zip(names).map(|(field, alias)| match alias {
        Some(alias) => Arc::new(field.as_ref().clone().with_name(alias.as_str())),
        None => Arc::clone(field),
    });
    let schema = Arc::new(Schema::new(renamed.collect::<Vec<_>>()));
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    RecordBatch::try_new_with_options(schema, rows.columns().to_vec(), &options).expect("only names are others")
}

/// The alias that each of these names takes; of several with the same alias the first.
fn aliased<'a, 'n>(aliases: &'a Aliases, names: impl Iterator<Item = &'n str> + Clone) -> Vec<Option<&'a FieldName>> {
    let mut taken: HashSet<&str> = names.clone().collect();
    let alias = |name: &str| {
        let (_, alias) = aliases.iter().find(|(from, _)| from.as_str() == name)?;
        Some(alias)
    };
    names.map(|name| alias(name).filter(|alias| taken.insert(alias.as_str()))).collect()
}

#[cfg(test)]
mod tests {
    use wire::FieldType;

    use super::*;

    #[test]
    fn a_field_has_its_alias_unless_that_is_there_as_well() {
        let aliases = ["old", "older"].map(|old| (old.parse().unwrap(), "new".parse().unwrap()));
        let aliases = Aliases::from(aliases);
        let check = |names: &[&str], expected: &[&str]| {
            let all = names.iter().map(|name| StreamField { name: name.parse().unwrap(), kind: FieldType::Int64 });
            let renamed = fields(Some(&aliases), &all.collect::<Vec<_>>()).into_owned();
            assert_eq!(renamed.iter().map(|field| field.name.as_str()).collect::<Vec<_>>(), expected);
            let column = || Arc::new(arrow_array::Int64Array::from(vec![1])) as arrow_array::ArrayRef;
            let batch = RecordBatch::try_from_iter(names.iter().map(|name| (*name, column()))).unwrap();
            let renamed = rows(&aliases, &batch);
            assert_eq!(
                renamed.schema().fields().iter().map(|field| field.name().clone()).collect::<Vec<_>>(),
                expected
            );
        };
        check(&["a", "old"], &["a", "new"]);
        check(&["old", "new"], &["old", "new"]);
        check(&["new"], &["new"]);
        check(&["older"], &["new"]);
        // Two names would be one: the second keeps its own.
        check(&["older", "old"], &["new", "old"]);
    }
}
