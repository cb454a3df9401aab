//! Links that would feed themselves, found before any of them runs.
//!
//! A link that tells on a topic feeds every link that listens there. Which topics it may tell on is known as a pattern: a place
//! in a topic may become any text, but never another level. Two patterns meet when some topic is among both. This is
//! careful and not clever: conditions are not looked at, so links that only their conditions keep apart are refused.

use std::collections::BTreeMap;

use crate::alerts::TopicFilter;

/// Whether some topic is among both.
pub(super) fn meet(one: &TopicFilter, other: &TopicFilter) -> bool {
    levels_meet(one.levels(), other.levels())
}

fn levels_meet(one: &[String], other: &[String]) -> bool {
    match (one, other) {
        ([], []) => true,
        // `a/#` means `a`, too.
        ([many], _) | (_, [many]) if many == "#" => true,
        ([], _) | (_, []) => false,
        ([one, ones @ ..], [other, others @ ..]) => {
            (one == other || one == "+" || other == "+") && levels_meet(ones, others)
        }
    }
}

/// What a link listens to, and where it tells, if it does.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    pub(super) from: TopicFilter,
    pub(super) to: Option<TopicFilter>,
}

/// The links of a loop in their order, the first again at the end; None when there is none.
pub(super) fn find(links: &BTreeMap<String, Ends>) -> Option<Vec<&str>> {
    let mut cleared = Vec::new();
    for name in links.keys() {
        let mut path = Vec::new();
        if walk(links, name, &mut path, &mut cleared) {
            let last = *path.last()?;
            let start = path.iter().position(|name| *name == last)?;
            return Some(path.split_off(start));
        }
    }
    None
}

/// Whether a loop is behind this link; then its end is the end of the path. Each link is looked at once.
fn walk<'l>(
    links: &'l BTreeMap<String, Ends>,
    name: &'l str,
    path: &mut Vec<&'l str>,
    cleared: &mut Vec<&'l str>,
) -> bool {
    if cleared.contains(&name) {
        return false;
    }
    let is_loop = path.contains(&name);
    path.push(name);
    if is_loop {
        return true;
    }
    if let Some(to) = links.get(name).and_then(|ends| ends.to.as_ref()) {
        for (next, ends) in links {
            if meet(to, &ends.from) && walk(links, next, path, cleared) {
                return true;
            }
        }
    }
    path.pop();
    cleared.push(name);
    false
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::parse(text).unwrap()
    }

    fn seeded() -> StdRng {
        let seed = rand::random();
        println!("seed {seed}");
        StdRng::seed_from_u64(seed)
    }

    /// Every topic of up to five levels of three words.
    fn topics() -> Vec<String> {
        let mut all = vec![String::new()];
        let mut longest = all.clone();
        for _ in 0..5 {
            let longer = |topic: &String| {
                ["a", "b", "c"].map(|level| if topic.is_empty() { level.into() } else { format!("{topic}/{level}") })
            };
            longest = longest.iter().flat_map(longer).collect();
            all.extend(longest.clone());
        }
        all.remove(0);
        all
    }

    fn random_filter(random: &mut StdRng) -> TopicFilter {
        let count = random.random_range(1..=4);
        let mut levels: Vec<&str> = (0..count).map(|_| *["a", "b", "+"].choose(random).unwrap()).collect();
        if random.random_bool(0.3) {
            *levels.last_mut().unwrap() = "#";
        }
        filter(&levels.join("/"))
    }

    #[test]
    fn patterns_meet_if_and_only_if_a_topic_is_among_both() {
        let (mut random, topics) = (seeded(), topics());
        let mut met = 0;
        for _ in 0..3_000 {
            let (one, other) = (random_filter(&mut random), random_filter(&mut random));
            let expected = topics.iter().any(|topic| one.matches(topic) && other.matches(topic));
            assert_eq!(meet(&one, &other), expected, "{one:?} {other:?}");
            assert_eq!(meet(&other, &one), expected, "{other:?} {one:?}");
            met += usize::from(expected);
        }
        assert!(met > 300 && met < 2_700, "{met} of 3000 meet");
    }

    #[test]
    fn loops_are_found_and_nothing_else() {
        let mut random = seeded();
        let mut looped = 0;
        for _ in 0..2_000 {
            let count = random.random_range(1..6);
            let links: BTreeMap<String, Ends> = (0..count)
                .map(|n| {
                    let to = random.random_bool(0.8).then(|| random_filter(&mut random));
                    (format!("l{n}"), Ends { from: random_filter(&mut random), to })
                })
                .collect();
            // Whether an event can come back to a link within as many steps as there are links.
            let feeds = |one: &str, other: &str| links[one].to.as_ref().is_some_and(|to| meet(to, &links[other].from));
            let comes_back = |start: &String| {
                let mut reached: Vec<&String> = links.keys().filter(|next| feeds(start, next)).collect();
                for _ in 0..count {
                    let next = |known: &Vec<&String>| {
                        links.keys().filter(|next| known.iter().any(|from| feeds(from, next))).collect::<Vec<_>>()
                    };
                    reached.extend(next(&reached));
                    reached.sort();
                    reached.dedup();
                }
                reached.contains(&start)
            };
            let expected = links.keys().any(comes_back);
            let found = find(&links);
            assert_eq!(found.is_some(), expected, "{links:?} {found:?}");
            if let Some(path) = found {
                looped += 1;
                assert!(path.len() > 1 && path.first() == path.last(), "{path:?}");
                assert!(path.windows(2).all(|pair| feeds(pair[0], pair[1])), "{path:?}");
            }
        }
        assert!(looped > 200, "{looped} of 2000 have a loop");
    }
}
