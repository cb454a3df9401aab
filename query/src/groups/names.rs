//! The number of each text, in the order in which they are met.

use std::mem::take;
use std::sync::Arc;

use arrow::compute::cast;
use arrow::datatypes::ArrowNativeType;
use arrow_array::cast::AsArray;
use arrow_array::types::Int32Type;
use arrow_array::{Array, ArrayRef, DictionaryArray, StringArray};
use arrow_schema::DataType;
use datafusion::common::{HashMap, Result, internal_err};

/// What a text takes beside itself: an entry of the table, half of which may be empty, its place in the list, counters.
const ENTRY_BYTES: usize = 80;

/// Of short texts, so many are known without a look at the table.
const SHORT_MAX: usize = 1 << 12;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Names {
    numbers: HashMap<Arc<str>, usize>,
    /// None: no text.
    names: Vec<Option<Arc<str>>>,
    none: Option<usize>,
    text_bytes: usize,
    /// Short texts that were met lately, as numbers of their own, each where that falls; 0 where there is none.
    short: Vec<(u128, usize)>,
    /// The dictionary of the last batch, and the number of each of its texts that was met.
    dictionary: Option<(ArrayRef, Vec<Option<usize>>)>,
}

impl Names {
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn bytes(&self) -> usize {
        let met = self.dictionary.as_ref().map_or(0, |(_, met)| met.capacity() * size_of::<Option<usize>>());
        self.text_bytes + self.names.len() * ENTRY_BYTES + met + self.short.capacity() * size_of::<(u128, usize)>()
    }

    /// The numbers of a batch's texts, in place of what is there. Texts are Utf8, or indices into a dictionary of such.
    ///
    /// # Errors
    /// When they are something else.
    pub(super) fn number(&mut self, texts: &ArrayRef, numbers: &mut Vec<usize>) -> Result<()> {
        numbers.clear();
        numbers.reserve(texts.len());
        match texts.as_dictionary_opt::<Int32Type>() {
            Some(indices) => self.number_indices(indices, numbers),
            None => self.number_texts(as_texts(texts)?, numbers),
        }
    }

    fn number_texts(&mut self, texts: &StringArray, numbers: &mut Vec<usize>) -> Result<()> {
        self.short.resize(SHORT_MAX, (0, 0));
        let mut before: Option<(Option<&str>, usize)> = None;
        for text in texts {
            let number = match (text.and_then(key_of), before) {
                (Some(key), _) => {
                    let at = place_of(key);
                    if self.short[at].0 != key {
                        self.short[at] = (key, self.number_of(text));
                    }
                    self.short[at].1
                }
                (None, Some((known, number))) if known == text => number,
                (None, _) => self.number_of(text),
            };
            before = Some((text, number));
            numbers.push(number);
        }
        Ok(())
    }

    fn number_indices(&mut self, indices: &DictionaryArray<Int32Type>, numbers: &mut Vec<usize>) -> Result<()> {
        let (dictionary, mut met) = match self.dictionary.take() {
            // As long as it is kept, no other one can lie where it does.
            Some((dictionary, met)) if dictionary.to_data().ptr_eq(&indices.values().to_data()) => (dictionary, met),
            _ => (Arc::clone(indices.values()), vec![None; indices.values().len()]),
        };
        let texts = as_texts(&dictionary)?;
        for index in indices.keys() {
            let number = match index.map(ArrowNativeType::as_usize) {
                None => self.number_of(None),
                Some(index) => match met[index] {
                    Some(number) => number,
                    None => *met[index].insert(self.number_of(texts.is_valid(index).then(|| texts.value(index)))),
                },
            };
            numbers.push(number);
        }
        self.dictionary = Some((dictionary, met));
        Ok(())
    }

    fn number_of(&mut self, text: Option<&str>) -> usize {
        let known = match text {
            Some(text) => self.numbers.get(text).copied(),
            None => self.none,
        };
        known.unwrap_or_else(|| {
            let number = self.names.len();
            let text = text.map(Arc::<str>::from);
            match &text {
                Some(text) => {
                    self.text_bytes += text.len();
                    self.numbers.insert(Arc::clone(text), number);
                }
                None => self.none = Some(number),
            }
            self.names.push(text);
            number
        })
    }

    /// All texts by their numbers; none is known any more.
    pub(super) fn take(&mut self) -> ArrayRef {
        Arc::new(take(self).names.into_iter().collect::<StringArray>())
    }
}

/// A text of at most 15 bytes as a number that no other one has: its bytes, and how many there are. Never 0.
fn key_of(text: &str) -> Option<u128> {
    let mut bytes = [0; 16];
    bytes[..15].get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    bytes[15] = text.len() as u8 + 1;
    Some(u128::from_le_bytes(bytes))
}

/// Where a short text falls.
fn place_of(key: u128) -> usize {
    let folded = (key as u64 ^ (key >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (folded >> 32) as usize % SHORT_MAX
}

/// Texts as they go on.
pub(super) fn texts(texts: &ArrayRef) -> Result<ArrayRef> {
    Ok(cast(texts, &DataType::Utf8)?)
}

fn as_texts(texts: &ArrayRef) -> Result<&StringArray> {
    let Some(texts) = texts.as_string_opt() else {
        return internal_err!("no texts to group by: {}", texts.data_type());
    };
    Ok(texts)
}
