//! A row of integers, in as few bits as their spread needs.
//!
//! ```text
//! head u8: bits 0-1 kind (0 all equal, 1 values, 2 steps) | bit 2 a divisor follows | bit 3 packed in bits
//! | base zigzag varint | divisor varint (bit 2) | kind 2: smallest step zigzag varint
//! | kinds 1, 2: width u8 | residuals, each (value - base) / divisor, or (step - smallest step) / divisor
//! ```
//! The base is the smallest value, or the first for steps, of which there is one less than values. Residuals are in `width`
//! bits each, from the lowest bit on; or in `width` bytes, all lowest bytes first, then all second ones: what is packed
//! again finds more in them that way. Arithmetic wraps, so all values are exact, and any bytes decode to something.

use super::BodyError;
use crate::bytes::{Reader, put_varint, put_zigzag};

const EQUAL: u8 = 0;
const VALUES: u8 = 1;
const STEPS: u8 = 2;
const KIND: u8 = 3;
const DIVISOR: u8 = 1 << 2;
const BITS: u8 = 1 << 3;

/// How residuals are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// The fewest bits: for bodies that are not packed again.
    Bits,
    /// Whole bytes, for Zstandard.
    Bytes,
}

/// Numbers as the distance from their smallest, divided by what divides all.
struct Residuals {
    least: i64,
    divisor: u64,
    values: Vec<u64>,
}

impl Residuals {
    fn of(numbers: impl Iterator<Item = i64> + Clone) -> Self {
        let least = numbers.clone().min().unwrap_or(0);
        let mut values = numbers.map(|number| number.wrapping_sub(least) as u64).collect::<Vec<_>>();
        let mut divisor = 0;
        for &value in &values {
            divisor = common_divisor(divisor, value);
            if divisor == 1 {
                break;
            }
        }
        if divisor > 1 {
            values.iter_mut().for_each(|value| *value /= divisor);
        }
        Self { least, divisor: divisor.max(1), values }
    }

    /// The width of the largest.
    fn bits(&self) -> usize {
        64 - self.values.iter().copied().max().unwrap_or(0).leading_zeros() as usize
    }

    /// About how many bits they take, in bytes that Zstandard packs.
    fn spread(&self) -> u64 {
        bits(self.values.iter().copied())
    }
}

fn bits(values: impl Iterator<Item = u64>) -> u64 {
    values.map(|value| u64::from(64 - value.leading_zeros())).sum()
}

fn common_divisor(mut a: u64, mut b: u64) -> u64 {
    if a != 0 && b.is_multiple_of(a) {
        return a;
    }
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Appends values; the base is written as its distance from `origin`.
pub(super) fn put(values: &[i64], origin: i64, layout: Layout, out: &mut Vec<u8>) {
    let at = out.len();
    out.push(0);
    out[at] = put_headless(values, origin, layout, out);
}

/// As [`put`], but the head, which has 4 bits, is returned and not written.
pub(super) fn put_headless(values: &[i64], origin: i64, layout: Layout, out: &mut Vec<u8>) -> u8 {
    let first = values.first().copied().unwrap_or(0);
    if values.iter().all(|value| *value == first) {
        put_zigzag(out, first.wrapping_sub(origin));
        return EQUAL;
    }
    let plain = Residuals::of(values.iter().copied());
    let steps = values.windows(2).map(|pair| pair[1].wrapping_sub(pair[0]));
    let stepped = Residuals::of(steps.clone());
    let steps_are_less = match layout {
        Layout::Bits => stepped.bits() * stepped.values.len() < plain.bits() * plain.values.len(),
        Layout::Bytes => {
            // One step far back makes all others large, and yet alike: their own sizes tell more then, with a bit for the sign.
            let divided = stepped.values.len() as u64 * u64::from(stepped.divisor.ilog2());
            let sizes = bits(steps.map(|step| step.unsigned_abs() << 1)).saturating_sub(divided);
            stepped.spread().min(sizes) < plain.spread()
        }
    };
    let (kind, base, residuals) = if steps_are_less { (STEPS, first, stepped) } else { (VALUES, plain.least, plain) };
    put_zigzag(out, base.wrapping_sub(origin));
    let mut head = kind;
    if residuals.divisor > 1 {
        head |= DIVISOR;
        put_varint(out, residuals.divisor);
    }
    if kind == STEPS {
        put_zigzag(out, residuals.least);
    }
    let bits = residuals.bits();
    match layout {
        Layout::Bits => {
            head |= BITS;
            out.push(bits as u8);
            put_bits(&residuals.values, bits, out);
        }
        Layout::Bytes => {
            let width = bits.div_ceil(8);
            out.push(width as u8);
            put_planes(&residuals.values, width, out);
        }
    }
    head
}

fn put_bits(values: &[u64], width: usize, out: &mut Vec<u8>) {
    let (mut waiting, mut bits) = (0_u128, 0);
    for &value in values {
        waiting |= u128::from(value) << bits;
        bits += width;
        while bits >= 8 {
            out.push(waiting as u8);
            waiting >>= 8;
            bits -= 8;
        }
    }
    if bits > 0 {
        out.push(waiting as u8);
    }
}

/// Also of floats: the bytes of all values by their place.
pub(super) fn put_planes(values: &[u64], width: usize, out: &mut Vec<u8>) {
    for plane in 0..width {
        out.extend(values.iter().map(|value| (value >> (8 * plane)) as u8));
    }
}

/// Reads back `count` values of [`put`].
pub(super) fn take(reader: &mut Reader<'_>, count: usize, origin: i64) -> Result<Vec<i64>, BodyError> {
    let head = reader.byte()?;
    take_headless(reader, head, count, origin)
}

/// As [`take`]; of the head only the lowest 4 bits count. At most `8 * count` bytes are given to the values.
pub(super) fn take_headless(
    reader: &mut Reader<'_>,
    head: u8,
    count: usize,
    origin: i64,
) -> Result<Vec<i64>, BodyError> {
    let base = reader.zigzag()?.wrapping_add(origin);
    let kind = head & KIND;
    if kind == EQUAL {
        return Ok(vec![base; count]);
    }
    if kind != VALUES && kind != STEPS {
        return Err(BodyError::Columns("a kind of integers that is not known"));
    }
    let divisor = if head & DIVISOR != 0 { reader.varint()? } else { 1 };
    let least = if kind == STEPS { reader.zigzag()? } else { base };
    let width = usize::from(reader.byte()?);
    let residuals = if kind == STEPS { count.saturating_sub(1) } else { count };
    let residuals =
        if head & BITS != 0 { take_bits(reader, residuals, width)? } else { take_planes(reader, residuals, width)? };
    let numbers = residuals.into_iter().map(|value| least.wrapping_add(value.wrapping_mul(divisor) as i64));
    if kind == VALUES {
        return Ok(numbers.collect());
    }
    let mut values = Vec::with_capacity(count);
    let mut value = base;
    values.extend((count > 0).then_some(value));
    for step in numbers {
        value = value.wrapping_add(step);
        values.push(value);
    }
    Ok(values)
}

fn take_bits(reader: &mut Reader<'_>, count: usize, width: usize) -> Result<Vec<u64>, BodyError> {
    if width > 64 {
        return Err(BodyError::Columns("integers of more than 64 bits"));
    }
    let mut bytes = reader.take((count * width).div_ceil(8))?.iter();
    let mask = if width == 64 { u64::MAX } else { (1 << width) - 1 };
    let (mut waiting, mut bits) = (0_u128, 0);
    let next = |_| {
        while bits < width {
            waiting |= u128::from(*bytes.next().unwrap_or(&0)) << bits;
            bits += 8;
        }
        let value = waiting as u64 & mask;
        waiting >>= width;
        bits -= width;
        value
    };
    Ok((0..count).map(next).collect())
}

pub(super) fn take_planes(reader: &mut Reader<'_>, count: usize, width: usize) -> Result<Vec<u64>, BodyError> {
    if width > 8 {
        return Err(BodyError::Columns("integers of more than 8 bytes"));
    }
    let bytes = reader.take(count * width)?;
    let mut values = vec![0; count];
    for plane in 0..width {
        let bytes = &bytes[plane * count..][..count];
        values.iter_mut().zip(bytes).for_each(|(value, byte)| *value |= u64::from(*byte) << (8 * plane));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(values: &[i64], origin: i64, layout: Layout) -> usize {
        let mut bytes = Vec::new();
        put(values, origin, layout, &mut bytes);
        let mut reader = Reader(&bytes);
        assert_eq!(take(&mut reader, values.len(), origin).unwrap(), values);
        assert!(reader.0.is_empty());
        for len in 0..bytes.len() {
            assert!(take(&mut Reader(&bytes[..len]), values.len(), origin).is_err(), "{len} of {}", bytes.len());
        }
        bytes.len()
    }

    #[test]
    fn all_values_come_back_and_every_cut_is_noticed() {
        let extremes = [i64::MIN, i64::MAX, 0, -1, 1, i64::MAX, i64::MIN, 7];
        for layout in [Layout::Bits, Layout::Bytes] {
            for origin in [0, 5, i64::MIN, i64::MAX] {
                for len in 0..extremes.len() {
                    bytes_of(&extremes[..len], origin, layout);
                }
                bytes_of(&[i64::MIN, i64::MAX], origin, layout);
                bytes_of(&[0, i64::MIN, 0, i64::MIN], origin, layout);
            }
        }
    }

    #[test]
    fn what_is_regular_takes_no_room() {
        let every_five_minutes = (0..100).map(|n| 1_406_894_400_000_000 + n * 300_000_000).collect::<Vec<_>>();
        assert!(bytes_of(&every_five_minutes, every_five_minutes[0], Layout::Bits) < 12);
        assert!(bytes_of(&[42; 100], 0, Layout::Bytes) <= 3);
        let seven_bits = (0..80_u8).map(|n| i64::from(crc32c::crc32c(&[n]) % 128)).collect::<Vec<_>>();
        assert!(bytes_of(&seven_bits, 0, Layout::Bits) <= 4 + 70);
        let a_round = [0, 37, 74].repeat(20);
        assert!(bytes_of(&a_round, 0, Layout::Bits) < 20, "few different steps");
    }
}
