use super::*;

#[test]
fn the_shipped_configuration_is_right() {
    let settings = Settings::parse(include_str!("../../../configs/cloud.toml")).unwrap();
    assert_eq!(settings.commit.max_age, Span(Duration::from_secs(60)));
    assert_eq!(settings.edge.len(), 1);
}

#[test]
fn wrong_configurations_say_what_is_wrong() {
    let check = |text: &str, expected: &str| {
        let error = Settings::parse(&format!("data_dir = \"x\"\n{text}")).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
        assert!(error.contains("line "), "no line: {text}: {error}");
    };
    check("[commit]\nmax_agee = \"1s\"", "did you mean `max_age`?");
    check("[commit]\nmax_age = \"soon\"", "\"250ms\"");
    check("[wal]\nmax_bytes = \"many\"", "\"64MiB\"");
    check("[commit]\nmax_partitions = 3", "less than 64");
    check("[wal]\nsegment_bytes = \"1MiB\"", "at least 33MiB");
    check("[wal]\nmax_bytes = \"100MiB\"\nsegment_bytes = \"40MiB\"", "at least eight times");
    check("[hot]\nmax_bytes = \"1MiB\"", "at least 128MiB");
    check("[pressure]\nalerts = 2.0", "from 0 to 0.5");
    check("[pressure]\nviews = nan", "from 0 to 0.5");
    check("[pressure]\nalerts = 0.3\nviews = 0.3", "together must be at most 0.5");
    check("[pressure]\nalerts = 0.001", "less than 8MiB");
    check("[hot]\nmax_bytes = \"128MiB\"\n[pressure]\nalerts = 0.06", "set it to 0.0625 at least");
    check("[hot]\nmax_bytes = \"128MiB\"\n[pressure]\nviews = 0.4375001", "together must be at most");
    check("[hot]\nmax_bytes = \"128MiB\"\n[pressure]\nviews = 0.4", "less than 80MiB");
    check("[pressure]\nviews_waiting = 0", "at least 1");
    check("[pressure]\nvews = 0.1", "did you mean `views`?");
    check("[limits]\nrequest_bytes = \"4MiB\"", "at least 33MiB");
    check("[limits]\nrequests_waiting = 0", "at least 1");
    check("[limits]\ndecoded_bytes = \"64MiB\"", "at least 128MiB");
    check("[write]\nmax_bytes = \"1GiB\"", "at most limits.request_bytes");
    check("[stream.s.alias]\na = \"b\"\nb = \"c\"", "has an alias itself");
    check("[stream.s.alias]\na = \"B\"", "is not a name");
    check("[write]\ndevise = []", "did you mean `device`?");
    check("[limits]\nwaiting_bytes = \"1MiB\"", "at least request_bytes");
    check("[[edge]]\nid = \"a b\"\ntoken = \"x\"", "not an edge id");
    check("[[edge]]\nid = \"a\"\ntoken = \"\"", "empty token");
    check("[[edge]]\nid = \"weir\"\ntoken = \"x\"", "what the cloud calls itself");
    check("[[edge]]\nid = \"a\"\ntoken = \"x\"\n[[edge]]\nid = \"a\"\ntoken = \"y\"", "twice");
    check("[[reader]]\nname = \"a\"\npassword = \"\"", "empty password");
    check("[listen]\nhttp = \"nowhere\"", "http");
    check("[lake]\ngrace = \"5m\"", "at least 1h");
    check("[lake]\ngrace = \"3d\"\nlog_keep = \"2d\"", "not less than lake.grace");
    check("[lake]\ncheckpoint_commits = 0", "at least 1");
    check("[compact]\ncpu_share = 0.0", "above 0");
    check("[compact]\ncpu_share = 1.5", "at most 1");
    check("[compact]\nfile_bytes = \"1MiB\"", "more than compact.small_bytes");
    check("[compact]\nmin_files = 1", "at least 2");
    check("[compact]\nmemory_bytes = \"1MiB\"", "at least 64MiB");
    check("[retention]\nkeep = \"long\"", "\"forever\"");
    check("[stream.\"a*b*c\"]\nkeep = \"1d\"", "one `*`");
    check("[stream.\"No Name\"]\nkeep = \"1d\"", "is no stream");
    check("[stream.traffic]\nkeeep = \"1d\"", "did you mean `keep`?");
    check("[listen]\nhttp_connections = 0", "http_connections must be at least 1");
    check("[listen]\npostgres_connections = 0", "postgres_connections must be at least 1");
    check("[alerts]\nsubscribers_max = 4096", "less than [listen] http_connections");
    check("[listen.tls]\ncertificate = \"a\"\nkey = \"b\"\ndoors = [\"smtp\"]", "smtp");
    check("[[query.lane]]\nname = \"a\"\n[[query.lane]]\nname = \"a\"", "twice");
    let target = |more: &str| format!("[[alerts.publish]]\nname = \"a\"\n{more}");
    check(&target("kind = \"webhook\"\nurl = \"mqtt://b\""), "http:// or https://");
    check(&target("kind = \"mqtt\"\nurl = \"mqtt://b\"\nsecret = \"x\""), "of a webhook");
    check(&target("kind = \"mqtt\"\nurl = \"mqtt://b\"\nca_file = \"x\""), "for mqtts://");
    check(&target("kind = \"mqtt\"\nurl = \"mqtts://b\"\ncert_file = \"x\"\nkey_file = \"y\""), "with ca_file");
    let target_of_view = |more: &str| format!("[[views.publish]]\nname = \"a\"\nview = \"v\"\n{more}");
    check(&target_of_view("kind = \"webhook\"\nurl = \"mqtt://b\""), "http:// or https://");
    check(&target_of_view("kind = \"alertmanager\"\nurl = \"http://b\""), "webhook or mqtt");
    check(&target_of_view("kind = \"mqtt\"\nurl = \"mqtt://b\"\ntopic = \"a/#\""), "no wildcards");
    check(&target_of_view("kind = \"webhook\"\nurl = \"http://b\"\ntopic = \"a\""), "is of mqtt");
    check(&target("kind = \"fax\"\nurl = \"mqtt://b\""), "fax");
    check("[broker]\nlisten = \"127.0.0.1:1\"\nlisten_v4 = \"127.0.0.1:1\"", "another address");
    check("[broker]\nlisten = \"127.0.0.1:0\"", "needs a port");
    check("[links]\ncommands_waiting = 0", "from 1 to 500");
    check("[links]\ndirektory = \"x\"", "did you mean `directory`?");
    check("[alerts]\ndirektory = \"x\"", "did you mean `directory`?");
    check("[[reader]]\nname = \"a\"\npassword = \"x\"\nscope = \"true\"\nrights = [\"rules\"]", "sees a part");
    check("[[query.lane]]\nname = \"a\"\nrunning = 0", "at least 1");
    check("[[query.lane]]\nname = \"views\"", "the lane of views");
    check("[views]\nthreads = 0", "at least 1");
    check("[views]\nanswer_rows = 1", "at least 1000");
    check("[[reader]]\nname = \"a\"\npassword = \"x\"\nedges = [\"b\"]\nrights = [\"views\"]", "sees a part");
    check("[[reader]]\nname = \"a\"\npassword = \"x\"\nlanes = [\"fast\"]", "no [[query.lane]] `fast`");
}

#[test]
fn no_secret_is_shown() {
    let settings = Settings::parse(
        "data_dir = \"x\"\n[[edge]]\nid = \"a\"\ntoken = \"secret\"\n[[reader]]\nname = \"n\"\npassword = \"secret\"",
    )
    .unwrap();
    assert!(!format!("{settings:?}").contains("secret"));
}
