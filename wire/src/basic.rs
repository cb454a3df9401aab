//! Name and password as HTTP carries them (RFC 7617): `Authorization: Basic …`.

/// Name and password of a header's value; none when it is no such header.
pub fn credentials(header: &str) -> Option<(String, String)> {
    let (scheme, encoded) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(base64(encoded.trim())?).ok()?;
    let (name, password) = text.split_once(':')?;
    Some((name.to_owned(), password.to_owned()))
}

/// Standard base64 (RFC 4648), padding optional.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut held) = (0_u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_as_rfc_4648_writes_it() {
        for (text, plain) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9vYmFy", "foobar"), ("YTpi", "a:b")] {
            assert_eq!(base64(text).unwrap(), plain.as_bytes());
        }
        assert!(base64("Z*").is_none());
    }

    #[test]
    fn name_and_password_are_read_and_nothing_else_is() {
        let pair = |name: &str, password: &str| Some((name.to_owned(), password.to_owned()));
        assert_eq!(credentials("Basic Z3c6YTpi"), pair("gw", "a:b"));
        assert_eq!(credentials("basic Z3c6"), pair("gw", ""));
        for bad in ["Basic", "Bearer Z3c6YTpi", "Basic Z3c", "Basic !!!!", "Basic /////w=="] {
            assert_eq!(credentials(bad), None, "{bad}");
        }
    }
}
