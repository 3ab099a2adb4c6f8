//! Negated powers, which Rhai reads as powers of what is negated: `-x ** 2` is `(-x) ** 2` there, and `-(x ** 2)` in Python
//! and in papers. Whoever means either has to say so.

/// Where a sign stands that would be raised to a power with what follows it: a byte of the text.
pub(super) fn negated(text: &str) -> Option<usize> {
    let code = without_texts(text);
    let mut from = 0;
    while let Some(at) = code[from..].windows(2).position(|pair| pair == b"**").map(|at| from + at) {
        let sign = before(&code, operand(&code, at)).filter(|sign| code[*sign] == b'-');
        // A minus behind an operand takes away; one behind nothing, an operator or an opening bracket is a sign.
        let is_sign = |sign: usize| {
            before(&code, sign).is_none_or(|last| !is_of_name(code[last]) && !matches!(code[last], b')' | b']' | b'.'))
        };
        if let Some(sign) = sign.filter(|sign| is_sign(*sign)) {
            return Some(sign);
        }
        from = at + 2;
    }
    None
}

/// The text's bytes, those within quotes as underscores.
fn without_texts(text: &str) -> Vec<u8> {
    let mut code = text.as_bytes().to_vec();
    let (mut quote, mut escaped) = (None, false);
    for byte in &mut code {
        let was = *byte;
        match quote {
            Some(end) => {
                *byte = b'_';
                if was == end && !escaped {
                    quote = None;
                }
                escaped = was == b'\\' && !escaped;
            }
            None if matches!(was, b'"' | b'\'' | b'`') => (quote, *byte) = (Some(was), b'_'),
            None => {}
        }
    }
    code
}

/// Where the operand begins that ends before `end`: names, numbers, calls, indices, and dots between them.
fn operand(code: &[u8], end: usize) -> usize {
    let mut start = end;
    while let Some(last) = before(code, start) {
        let byte = code[last];
        // With nothing between two names they are not one operand.
        let goes_on = start == end || last + 1 == start;
        if goes_on && matches!(byte, b')' | b']') {
            start = opening(code, last);
        } else if goes_on && (is_of_name(byte) || byte == b'.') {
            start = last;
        } else {
            break;
        }
    }
    start
}

/// The bracket that the one at `close` closes.
fn opening(code: &[u8], close: usize) -> usize {
    let mut depth = 0usize;
    for at in (0..=close).rev() {
        match code[at] {
            b')' | b']' => depth += 1,
            b'(' | b'[' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    0
}

/// The last byte before `end` that is no space.
fn before(code: &[u8], end: usize) -> Option<usize> {
    code[..end].iter().rposition(|byte| !byte.is_ascii_whitespace())
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

#[cfg(test)]
mod tests {
    use super::negated;

    #[test]
    fn signs_before_powers_are_found() {
        for (text, at) in [
            ("-x ** 2", 0),
            ("1 + -x**2", 4),
            ("a * (- f(x, (1))[0].y ** 2)", 5),
            ("2 ** 3 + -2 ** 2", 9),
            ("max(-x ** 2, 0)", 4),
            ("2 ** -x ** 2", 5),
        ] {
            assert_eq!(negated(text), Some(at), "{text}");
        }
        for text in [
            "x ** 2",
            "a - x ** 2",
            "f(a) - x ** 2",
            "a[0] -x ** 2",
            "1e-3 ** 2",
            "-(x ** 2)",
            "(-x) ** 2",
            "x ** -2",
            "-x * 2",
            "\"-x ** 2\"",
            "'-' ** 2",
            "2. - x ** 2",
            ") ** 2",
        ] {
            assert_eq!(negated(text), None, "{text}");
        }
    }
}
