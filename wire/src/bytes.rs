//! The small parts that formats here are made of: lengths, numbers, texts, and times, and how they are read back.
//!
//! `varint` is LEB128, at most 10 bytes; `zigzag` maps signed numbers to unsigned ones, small to small. A `time` is a varint
//! of 65 bits: zigzag of seconds, times two, plus one; or, when it is not a whole second, zigzag of µs, times two. Zero is
//! left over and means "none". Reading never takes more than is there and never panics.

/// What is still to be read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

/// The bytes end too early, or a number has too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Short;

const SECOND_US: i64 = 1_000_000;

pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

fn put_wide(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_varint(out: &mut Vec<u8>, value: u64) {
    put_wide(out, u128::from(value));
}

pub(crate) fn put_zigzag(out: &mut Vec<u8>, value: i64) {
    put_varint(out, zigzag(value));
}

pub(crate) fn put_time(out: &mut Vec<u8>, time: Option<i64>) {
    let whole = |us: i64| (us % SECOND_US == 0).then_some(us / SECOND_US);
    put_wide(
        out,
        time.map_or(0, |us| match whole(us) {
            Some(seconds) => u128::from(zigzag(seconds)) << 1 | 1,
            None => u128::from(zigzag(us)) << 1,
        }),
    );
}

/// A length byte and the text, which is cut at 255 bytes.
pub(crate) fn put_str8(out: &mut Vec<u8>, text: &str) {
    let text = clip(text, usize::from(u8::MAX));
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// The longest front part of so many bytes.
pub(crate) fn clip(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Short> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Short)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Short> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Short> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Short> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn wide(&mut self) -> Result<u128, Short> {
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            value |= u128::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Short)
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Short> {
        u64::try_from(self.wide()?).map_err(|_| Short)
    }

    /// A varint that is a length or a count.
    pub(crate) fn len(&mut self) -> Result<usize, Short> {
        usize::try_from(self.varint()?).map_err(|_| Short)
    }

    pub(crate) fn zigzag(&mut self) -> Result<i64, Short> {
        Ok(unzigzag(self.varint()?))
    }

    pub(crate) fn time(&mut self) -> Result<Option<i64>, Short> {
        let value = self.wide()?;
        let number = unzigzag(u64::try_from(value >> 1).map_err(|_| Short)?);
        match value {
            0 => Ok(None),
            _ if value & 1 == 0 => Ok(Some(number)),
            _ => number.checked_mul(SECOND_US).map(Some).ok_or(Short),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_come_back() {
        for value in [0, 1, -1, 63, 64, -65, SECOND_US, -SECOND_US, 1_406_894_400_000_001, i64::MIN, i64::MAX] {
            let mut bytes = Vec::new();
            put_zigzag(&mut bytes, value);
            put_time(&mut bytes, Some(value));
            put_time(&mut bytes, None);
            let mut reader = Reader(&bytes);
            assert_eq!(reader.zigzag(), Ok(value));
            assert_eq!(reader.time(), Ok(Some(value)));
            assert_eq!(reader.time(), Ok(None));
            assert_eq!(reader.byte(), Err(Short));
        }
        let mut bytes = Vec::new();
        put_time(&mut bytes, Some(1_406_894_400 * SECOND_US));
        assert_eq!(bytes.len(), 5, "whole seconds are short");
        assert_eq!(Reader(&[0xff; 11]).varint(), Err(Short));
        assert_eq!(Reader(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]).varint(), Err(Short));
    }
}
