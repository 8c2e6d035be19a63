//! The date that `strftime_now` sees: given by the caller, so that the same records always make the same text.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// A date and time of day, without a time zone, as Python's `datetime.now()` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl DateTime {
    /// The present, in UTC.
    pub fn now() -> Self {
        let seconds = std::time::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_secs());
        let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
        let mut year = 1970;
        while days >= 365 + u64::from(is_leap(year)) {
            days -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let mut month = 1;
        while days >= u64::from(days_in(year, month)) {
            days -= u64::from(days_in(year, month));
            month += 1;
        }
        let (hour, minute, second) = ((rest / 3600) as u8, (rest / 60 % 60) as u8, (rest % 60) as u8);
        Self { year, month, day: days as u8 + 1, hour, minute, second }
    }

    fn day_of_year(self) -> u16 {
        (1..self.month).map(|month| u16::from(days_in(self.year, month))).sum::<u16>() + u16::from(self.day)
    }

    /// Day of the week, Sunday being 0.
    fn weekday(self) -> usize {
        let years = usize::from(self.year) - 1;
        (years * 365 + years / 4 - years / 100 + years / 400 + usize::from(self.day_of_year())) % 7
    }

    /// `datetime.strftime(format)` in the C locale, or the directive that is not supported.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let mut out = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                out.push(letter);
                continue;
            }
            let mut directive = letters.next();
            let is_bare = directive == Some('-');
            if is_bare {
                directive = letters.next();
            }
            let number = |value: u16, width: usize| match is_bare {
                true => value.to_string(),
                false => format!("{value:0width$}"),
            };
            let twelve = (self.hour + 11) % 12 + 1;
            let month = MONTHS[usize::from(self.month) - 1];
            let weekday = WEEKDAYS[self.weekday()];
            let text = match directive {
                Some('d') => number(self.day.into(), 2),
                Some('m') => number(self.month.into(), 2),
                Some('y') => number(self.year % 100, 2),
                Some('H') => number(self.hour.into(), 2),
                Some('I') => number(twelve.into(), 2),
                Some('M') => number(self.minute.into(), 2),
                Some('S') => number(self.second.into(), 2),
                Some('j') => number(self.day_of_year(), 3),
                Some(other) if is_bare => return Err(format!("%-{other}")),
                Some('Y') => self.year.to_string(),
                Some('B') => month.into(),
                Some('b' | 'h') => month[..3].into(),
                Some('A') => weekday.into(),
                Some('a') => weekday[..3].into(),
                Some('p') => (if self.hour < 12 { "AM" } else { "PM" }).into(),
                Some('e') => format!("{:2}", self.day),
                Some('F') => format!("{}-{:02}-{:02}", self.year, self.month, self.day),
                Some('T') => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
                Some('f') => "000000".into(),
                Some('%') => "%".into(),
                Some(other) => return Err(format!("%{other}")),
                None => return Err("%".into()),
            };
            out.push_str(&text);
        }
        Ok(out)
    }
}

fn is_leap(year: u16) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in(year: u16, month: u8) -> u8 {
    match month {
        2 => 28 + u8::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Writes `2026-01-31T23:59:59`, which [`DateTime::from_str`] reads.
impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { year, month, day, hour, minute, second } = self;
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
    }
}

/// Reads `2026-01-31` or `2026-01-31T23:59:59`.
impl FromStr for DateTime {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let read = || {
            let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
            let numbers = |text: &str, separator: char| -> Option<[u16; 3]> {
                let parts: Vec<u16> = text
                    .split(separator)
                    .map(|part| part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse().ok()).flatten())
                    .collect::<Option<_>>()?;
                parts.try_into().ok()
            };
            let [year, month, day] = numbers(date, '-')?;
            let [hour, minute, second] = numbers(time, ':')?;
            let is_valid = (1000..=9999).contains(&year)
                && (1..=12).contains(&month)
                && (1..=u16::from(days_in(year, month as u8))).contains(&day)
                && hour < 24
                && minute < 60
                && second < 60;
            is_valid.then_some(Self {
                year,
                month: month as u8,
                day: day as u8,
                hour: hour as u8,
                minute: minute as u8,
                second: second as u8,
            })
        };
        read().ok_or_else(|| {
            Error::new(ErrorKind::Argument, format!("expected a date, found '{text}'"))
                .with_hint("write it as 2026-01-31 or 2026-01-31T23:59:59")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Dates read back as they are written; what is no date is refused.
    #[test]
    fn dates_read_back() {
        for text in ["2024-02-29T23:59:58", "1999-12-31T00:00:00"] {
            assert_eq!(text, text.parse::<DateTime>().unwrap().to_string());
        }
        assert_eq!("2026-01-31T00:00:00", "2026-01-31".parse::<DateTime>().unwrap().to_string());
        for text in ["", "2023-02-29", "2026-13-01", "2026-1", "2026-01-31T24:00:00", "2026-01-+1", "26-01-31"] {
            assert!(text.parse::<DateTime>().is_err(), "{text}");
        }
        assert!(DateTime::now().to_string().parse::<DateTime>().is_ok());
    }

    // Directives print what Python's `strftime` prints in the C locale; unknown ones are named.
    #[test]
    fn directives_are_pythons() {
        let date: DateTime = "2024-02-05T00:07:09".parse().unwrap();
        assert_eq!("05 Feb 2024, Monday, February 036", date.format("%d %b %Y, %A, %B %j").unwrap());
        assert_eq!("5 2 24 12:07 AM  5 Mon 100%", date.format("%-d %-m %y %I:%M %p %e %a 100%%").unwrap());
        assert_eq!("2024-02-05 00:07:09", date.format("%F %T").unwrap());
        assert_eq!(Err("%Q".to_owned()), date.format("%Q"));
        assert_eq!(Err("%-Y".to_owned()), date.format("%-Y"));
    }
}
