//! What an operator would see.

use super::*;

#[test]
fn a_child_comes_and_goes_as_charon_has_it() {
    let mut story = Story::new();
    assert!(story.snapshot().is_empty());
    // An SPI for what we receive with; two are never the same.
    let spis: Vec<u32> = (0..2)
        .map(|_| {
            let request = larval_request(&mut story);
            let answers = story.asks(request);
            let one = messages(&answers[0]).next().unwrap().unwrap();
            assert_eq!((one.kind, one.sequence), (kind::NEWSA, story.sequence));
            let larval = parse_sa(one.body).unwrap().unwrap();
            assert!(matches!(larval.cipher, XfrmCipher::Larval));
            larval.key.spi.get()
        })
        .collect();
    assert!(
        spis.iter()
            .all(|spi| (0xc000_0000..=0xcfff_ffff).contains(spi))
            && spis[0] != spis[1]
    );

    // The key for it, then the SA that we send with; with the mark of mark_in_sa, too.
    let spi = esplane_api::Spi::new(spis[0]).unwrap();
    let inbound = sa(SaKey {
        spi,
        mark: (0xdead00, u32::MAX),
        ..key("198.51.100.1", "0x100")
    });
    story.events.clear();
    assert_eq!(story.adds(kind::UPDSA, &inbound), 0);
    assert_eq!(story.adds(kind::NEWSA, &outbound()), 0);
    let [XfrmEvent::Installed(first), XfrmEvent::Installed(second)] = &story.events[..] else {
        panic!("{:?}", story.events)
    };
    assert_eq!((first.key, second.key), (inbound.key, outbound().key));
    assert_eq!(first.added_unix_seconds, 1_700_000_000);
    assert_eq!(
        story.adds(kind::UPDSA, &sa(key("198.51.100.1", "0xc1111111"))),
        3,
        "no such SPI is reserved"
    );

    // A dump shows both and the SPI that still waits.
    let dump = Builder::new(
        kind::GETSA,
        flag::REQUEST | flag::DUMP,
        story.sequence(),
        &[0; 24],
    );
    let parts = story.asks(dump);
    let kinds: Vec<u16> = parts.iter().map(|part| u16_at(part, 4)).collect();
    assert_eq!(kinds, [kind::NEWSA, kind::NEWSA, kind::NEWSA, kind::DONE]);
    assert!(parts.iter().all(|part| u16_at(part, 6) & flag::MULTI != 0));

    // It ends. What is gone stays gone, and nothing of it is kept.
    story.events.clear();
    for gone in [inbound.key, outbound().key] {
        let request = story.names(kind::DELSA, &gone);
        assert_eq!(story.does(request), 0);
        let again = story.names(kind::DELSA, &gone);
        assert_eq!(story.does(again), 3);
        assert!(story.looks_at(&gone).is_none());
    }
    assert!(matches!(
        story.events[..],
        [XfrmEvent::Removed(_), XfrmEvent::Removed(_)]
    ));
    story.passes(200);
    assert!(story.kept.is_empty(), "the second SPI's time is over, too");
}

#[test]
fn charon_sees_what_was_carried_and_when_it_was_last() {
    let mut story = Story::new();
    story.adds(kind::NEWSA, &outbound());
    let key = outbound().key;
    story.passes(10);
    assert!(story.stores(key, Some(1 << 26), 7).done);
    story.passes(10);
    // The same again: nothing was carried meanwhile.
    let reply = story.stores(key, Some(1 << 26), 7);
    assert_eq!((reply.done, reply.sequence_sent), (true, Some(1 << 26)));
    let body = story.looks_at(&key).unwrap();
    assert_eq!(
        (u64_at(&body, at::CARRIED), u64_at(&body, at::CARRIED + 8)),
        (700, 7)
    );
    let last = find(&body[size::USERSA_INFO..], attribute::LASTUSED)
        .unwrap()
        .unwrap();
    assert_eq!(u64_at(last, 0), 1_700_000_010);

    // MOBIKE asks for the replay state, too, and adds the SA anew under other addresses.
    let request = story.names(kind::GETAE, &key);
    let answers = story.asks(request);
    let one = messages(&answers[0]).next().unwrap().unwrap();
    assert_eq!(one.kind, kind::NEWAE);
    let find_in = |wanted| {
        find(&one.body[size::AEVENT_ID..], wanted)
            .unwrap()
            .unwrap()
            .to_vec()
    };
    let (replay, carried) = (
        find_in(attribute::REPLAY_ESN_VAL),
        find_in(attribute::LTIME_VAL),
    );
    assert_eq!(u32_at(&replay, 4), 1 << 26);
    let request = story.names(kind::DELSA, &key);
    story.does(request);
    let moved = sa(SaKey {
        destination: "203.0.113.9".parse().unwrap(),
        ..key
    });
    story.events.clear();
    let sequence = story.sequence();
    let again = build_sa(kind::NEWSA, flag::REQUEST | flag::ACK, sequence, &moved)
        .attribute(attribute::REPLAY_ESN_VAL, &replay)
        .attribute(attribute::LTIME_VAL, &carried);
    assert_eq!(story.does(again), 0);
    let [XfrmEvent::Installed(sa)] = &story.events[..] else {
        panic!()
    };
    assert_eq!(
        (sa.sequence_sent, sa.packets, sa.added_unix_seconds),
        (1 << 26, 7, 1_700_000_000)
    );
}

#[test]
fn esplane_is_killed_and_finds_every_sa_behind_the_last_reserved_number() {
    let mut story = Story::new();
    let request = larval_request(&mut story);
    story.asks(request);
    story.adds(kind::NEWSA, &outbound());
    let key = outbound().key;
    assert!(story.stores(key, Some(5 << 26), 40).done);
    story.passes(60);
    story.events.clear();
    story.esplane_restarts();
    let found = story.snapshot().iter().find(|sa| sa.key == key).unwrap();
    assert_eq!((found.sequence_sent, found.packets), (5 << 26, 40));
    assert_eq!(found.added_unix_seconds, 1_700_000_000);
    let XfrmCipher::Aead(material) = &found.cipher else {
        panic!()
    };
    let XfrmCipher::Aead(expected) = &outbound().cipher else {
        panic!()
    };
    assert!(material.same_secret(expected));
    assert_eq!(story.snapshot().len(), 2, "and the SPI that was reserved");
    // A lower number is never taken for reserved, whoever asks.
    assert!(!story.stores(key, Some((5 << 26) - 1), 41).done);
    assert!(story.stores(key, Some(6 << 26), 41).done);
    // What was asked again because the answer was lost is done, not refused.
    assert_eq!(story.adds(kind::NEWSA, &outbound()), 0);
    let XfrmCipher::Aead(_) = story.snapshot()[1].cipher else {
        panic!()
    };
    // Its lifetime goes on from when it began: 60 of its 3000 seconds are over.
    story.passes(2941);
    let told = story.told();
    assert_eq!(told.len(), 1);
    let one = messages(&told[0]).next().unwrap().unwrap();
    assert_eq!(message::parse_expire(one.body).unwrap(), Some((key, false)));
}

#[test]
fn nothing_is_reserved_that_is_not_kept() {
    let mut story = Story::new();
    story.adds(kind::NEWSA, &outbound());
    let key = outbound().key;
    story.keeps_its_word = false;
    story.events.clear();
    let store = |sent| XfrmRequest::Store {
        key,
        progress: Progress {
            sent: Some(sent),
            packets: 1,
            bytes: 1,
            ..Progress::default()
        },
    };
    story.requests(store(1 << 26));
    story.requests(XfrmRequest::Expire { key, hard: false });
    let replies = |story: &Story| {
        let replies = story.events.iter().filter_map(|event| match event {
            XfrmEvent::Reply(reply) => Some(reply.done),
            _ => None,
        });
        replies.collect::<Vec<_>>()
    };
    assert!(replies(&story).is_empty(), "the second waits for its turn");
    story.kernel.handle_disconnected(story.client);
    story.settle();
    assert_eq!(replies(&story), [false, true]);
    // With charon away nothing can be reserved.
    story.requests(store(2 << 26));
    assert_eq!(replies(&story), [false, true, false]);
    assert!(story.notices.contains(&KernelNotice::Disconnected));
}

#[test]
fn the_sas_of_a_charon_that_is_gone_go_when_the_next_one_comes() {
    let mut story = Story::new();
    story.adds(kind::NEWSA, &outbound());
    story.events.clear();
    story.kernel.handle_disconnected(story.client);
    story.settle();
    assert!(story.events.is_empty(), "until then they carry on");
    story.charon_restarts();
    assert!(story.snapshot().is_empty());

    // Likewise if the library connects before charon has bound its second socket.
    story.adds(kind::NEWSA, &outbound());
    story.kernel.handle_disconnected(story.client);
    story.client = ClientId(9);
    story.kernel.handle_connected(story.client);
    story.says(Kind::Hello, frame::VERSION, &[9; 8]);
    story.says(Kind::Join, ASKS, &0u32.to_ne_bytes());
    story.says(Kind::Ready, 0, &[]);
    assert_eq!(
        story.snapshot().len(),
        1,
        "this may be any program that looks"
    );
    story.says(Kind::Join, LISTENS, &EVENTS.to_ne_bytes());
    assert!(story.snapshot().is_empty());
}

#[test]
fn lifetimes_and_requests_reach_charon_as_the_kernel_says_them() {
    let mut story = Story::new();
    let marked = sa(SaKey {
        mark: (0xdead00, u32::MAX),
        ..outbound().key
    });
    story.adds(kind::NEWSA, &marked);
    for (seconds, hard) in [(3000, false), (600, true)] {
        story.events.clear();
        story.answers.clear();
        story.passes(seconds);
        assert!(
            matches!(story.events[..], [XfrmEvent::Expired { hard: told, .. }] if told == hard)
        );
        let told = story.told();
        let one = messages(&told[0]).next().unwrap().unwrap();
        assert_eq!((one.kind, one.sequence), (kind::EXPIRE, 0));
        assert_eq!(
            message::parse_expire(one.body).unwrap(),
            Some((marked.key, hard))
        );
    }
    assert!(story.kept.is_empty() && story.looks_at(&marked.key).is_none());

    // A peer whose NAT has rebound, and packets that wait.
    story.adds(kind::NEWSA, &outbound());
    story.answers.clear();
    let remote = "192.0.2.7:1027".parse().unwrap();
    story.requests(XfrmRequest::PeerMoved {
        key: outbound().key,
        remote,
    });
    story.requests(XfrmRequest::Acquire {
        reqid: 9,
        ends: (
            "198.51.100.1".parse().unwrap(),
            "203.0.113.1".parse().unwrap(),
        ),
        selectors: esplane_api::SelectorPair {
            local: "10.1.0.0/24".parse().unwrap(),
            remote: "10.2.0.7".parse().unwrap(),
        },
    });
    let told = story.told();
    let [mapping, acquire] = &told[..] else {
        panic!("{}", told.len())
    };
    let mapping = messages(mapping).next().unwrap().unwrap();
    assert_eq!(
        (mapping.kind, mapping.body.len()),
        (kind::MAPPING, size::USER_MAPPING)
    );
    assert_eq!(mapping.body[44..48], [192, 0, 2, 7]);
    assert_eq!(mapping.body[62..64], 1027u16.to_be_bytes());
    let acquire = messages(acquire).next().unwrap().unwrap();
    assert_eq!(acquire.kind, kind::ACQUIRE);
    let template = find(&acquire.body[size::USER_ACQUIRE..], attribute::TMPL)
        .unwrap()
        .unwrap();
    assert_eq!((u32_at(template, 44), template[20]), (9, 50));
    assert_eq!((acquire.body[40 + 42], acquire.body[40 + 43]), (32, 24));
}

#[test]
fn policies_are_kept_and_told_and_know_their_last_use() {
    let mut story = Story::new();
    let mut fixed = [0; size::USERPOLICY_INFO];
    put(&mut fixed, 0, &[10, 2, 0, 0]);
    put(&mut fixed, 16, &[10, 1, 0, 0]);
    fixed[160] = 1;
    let mut template = [0; size::USER_TMPL];
    put(&mut template, 44, &1u32.to_ne_bytes());
    let flags = flag::REQUEST | flag::ACK;
    let policy = |story: &mut Story, kind| {
        Builder::new(kind, flags, story.sequence(), &fixed).attribute(attribute::TMPL, &template)
    };
    let mut id = [0; size::USERPOLICY_ID];
    put(&mut id, 0, &fixed[..size::SELECTOR]);
    id[60] = 1;
    let name = |story: &mut Story, kind| Builder::new(kind, flags, story.sequence(), &id);

    let new = policy(&mut story, kind::NEWPOLICY);
    assert_eq!(story.does(new), 0);
    let again = policy(&mut story, kind::NEWPOLICY);
    assert_eq!(story.does(again), 0, "asked again, it is there");
    let update = policy(&mut story, kind::UPDPOLICY).attribute(attribute::IF_ID, &[0; 4]);
    assert_eq!(story.does(update), 0);
    let other = policy(&mut story, kind::NEWPOLICY);
    assert_eq!(story.does(other), 17, "another policy is in its place");
    story.adds(kind::NEWSA, &outbound());
    story.passes(5);
    story.stores(outbound().key, None, 3);
    story.esplane_restarts();
    let get = name(&mut story, kind::GETPOLICY);
    let answers = story.asks(get);
    let one = messages(&answers[0]).next().unwrap().unwrap();
    assert_eq!(one.kind, kind::NEWPOLICY);
    assert_eq!(u64_at(one.body, 56 + 64 + 24), 1_700_000_005);
    let delete = name(&mut story, kind::DELPOLICY);
    assert_eq!(story.does(delete), 0);
    let delete = name(&mut story, kind::DELPOLICY);
    assert_eq!(story.does(delete), 2);
}

#[test]
fn what_esplane_cannot_carry_is_refused_by_name() {
    let mut story = Story::new();
    let transport = XfrmSa {
        mode: XfrmMode::Transport,
        ..outbound()
    };
    assert_eq!(story.adds(kind::NEWSA, &transport), 38);
    let mut cbc = outbound();
    cbc.cipher = XfrmCipher::Larval;
    let mut name = [0; 68 + 16];
    put(&mut name, 0, b"cbc(aes)");
    put(&mut name, 64, &128u32.to_ne_bytes());
    let sequence = story.sequence();
    let request = build_sa(kind::NEWSA, flag::REQUEST | flag::ACK, sequence, &cbc);
    assert_eq!(
        story.does(request.attribute(attribute::ALG_CRYPT, &name)),
        38
    );
    let said: Vec<String> = story.notices.iter().map(ToString::to_string).collect();
    assert!(
        said.iter().any(|said| said.contains("transport mode")),
        "{said:?}"
    );
    assert!(
        said.iter()
            .any(|said| said.contains("cbc(aes)") && said.contains("aes256gcm16"))
    );
    // Another key under a name that is taken, and what the kernel can and we cannot.
    story.adds(kind::NEWSA, &outbound());
    let mut other = outbound();
    other.cipher = XfrmCipher::Aead(KeyMaterial::new(AeadSuite::Aes256Gcm16, &[9; 36]).unwrap());
    assert_eq!(story.adds(kind::NEWSA, &other), 17);
    let migrate = Builder::new(
        kind::MIGRATE,
        flag::REQUEST | flag::ACK,
        story.sequence(),
        &[0; 64],
    );
    assert_eq!(story.does(migrate), 95);
    let short = Builder::new(
        kind::DELSA,
        flag::REQUEST | flag::ACK,
        story.sequence(),
        &[0; 3],
    );
    assert_eq!(story.does(short), 22);
}

#[test]
fn strangers_are_not_served() {
    let mut kernel = kernel();
    let client = ClientId(1);
    kernel.handle_connected(client);
    let now = Now::default();
    let mut says = |kind, id, payload: &[u8]| kernel.handle_frame(now, client, kind, id, payload);
    assert!(says(Kind::Request, 1, &[]).is_err());
    let error = says(Kind::Hello, frame::VERSION + 1, &[1; 8]).unwrap_err();
    assert!(error.to_string().contains("one release"), "{error}");
    assert!(says(Kind::Hello, frame::VERSION, &[1; 8]).is_ok());
    assert!(
        says(Kind::Request, 1, &[]).is_err(),
        "it has not said what it keeps"
    );
    assert!(says(Kind::Ready, 0, &[]).is_ok());
    assert!(says(Kind::Keep, 0, &[]).is_err());
}
