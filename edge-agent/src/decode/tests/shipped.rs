//! The mappings of configs/formats, with payloads as the documentation of each system shows them.

use std::path::PathBuf;

use super::*;

const HEAD: &str = "[edge]\nid = \"e\"\ndata_dir = \"x\"\n[cloud]\nurls = [\"http://h\"]\ntoken = \"t\"\n";

/// What the sources of a file make of a message: stream, device, time, and the fields that are not null.
fn read(file: &str, topic: &str, payload: &[u8]) -> Vec<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../configs/formats").join(file);
    let settings = Settings::parse(&format!("{HEAD}{}", std::fs::read_to_string(path).unwrap())).unwrap();
    let mut texts = Vec::new();
    for source in &settings.source {
        let stream = &settings.stream[source.stream()];
        let mut out = Vec::new();
        let mut decoder = Decoder::new(&source.decoding().unwrap(), stream);
        decoder.decode(topic, &Bytes::copy_from_slice(payload), ARRIVAL, &mut out);
        for result in out {
            let reading = result.unwrap_or_else(|rejected| panic!("{file} {rejected:?}"));
            let quality = &mut crate::validate::Quality::default();
            crate::validate::Checks::new(stream).check(&reading, ARRIVAL * 2, quality).unwrap();
            let values = stream.fields.iter().zip(&reading.values).filter_map(|((name, _), value)| {
                let value = match value.as_ref()? {
                    Value::Float(value) => value.to_string(),
                    Value::Int(value) => value.to_string(),
                    Value::Bool(value) => value.to_string(),
                    Value::Text(value) => value.clone(),
                };
                Some(format!("{name}={value}"))
            });
            let time = chrono::DateTime::from_timestamp_micros(reading.ts).unwrap().format("%FT%T%.f");
            let values = values.collect::<Vec<_>>().join(" ");
            texts.push(format!("{} {} {time} {values}", source.stream(), reading.device));
        }
    }
    texts
}

fn check(file: &str, topic: &str, payload: &str, expected: &[&str]) {
    assert_eq!(read(file, topic, payload.as_bytes()), expected, "{file}");
}

#[test]
fn tasmota() {
    let json = r#"{"Time":"2019-07-10T18:23:24","ENERGY":{"TotalStartTime":"2018-11-14T18:39:40","Total":6.294,"Today":0.954,
        "Power":2635,"ApparentPower":2650,"ReactivePower":282,"Factor":0.99,"Voltage":227,"Current":11.661},
        "AM2301":{"Temperature":21.1,"Humidity":58.0,"DewPoint":12.5},"TempUnit":"C"}"#;
    check(
        "tasmota.toml",
        "tele/plug-7/SENSOR",
        json,
        &[
            "tasmota_energy plug-7 2019-07-10T16:23:24 power=2635 apparent_power=2650 reactive_power=282 power_factor=0.99 \
         voltage=227 current=11.661 energy_total=6.294 energy_today=0.954",
            "tasmota_climate plug-7 2019-07-10T16:23:24 sensor=AM2301 temperature=21.1 humidity=58 dew_point=12.5",
        ],
    );
    check("tasmota.toml", "tele/plug-7/SENSOR", r#"{"Time":"2019-07-10T18:23:24","ANALOG":{"A0":8}}"#, &[]);
}

#[test]
fn zigbee2mqtt() {
    let json = r#"{"temperature":27.34,"humidity":44.72,"battery":87,"voltage":2995,"linkquality":126}"#;
    check(
        "zigbee2mqtt.toml",
        "zigbee2mqtt/hall",
        json,
        &["zigbee hall 2023-11-14T22:13:20 temperature=27.34 humidity=44.72 battery=87 voltage=2995 linkquality=126"],
    );
    check("zigbee2mqtt.toml", "zigbee2mqtt/group", r#"{"state":"ON"}"#, &[]);
}

#[test]
fn shelly() {
    let json = r#"{"src":"shellypro4pm-f008d1d8b8b8","dst":"shellypro4pm-f008d1d8b8b8/events","method":"NotifyStatus",
        "params":{"ts":1631186545.04,"switch:0":{"id":0,"apower":8.9,"voltage":237.5,"output":true,
        "aenergy":{"by_minute":[0,0,0],"minute_ts":1631186544,"total":11.2},"temperature":{"tC":23.5,"tF":74.4}},
        "switch:1":{"id":1,"apower":0},"sys":{"uptime":7}}}"#;
    check(
        "shelly.toml",
        "shellypro4pm-f008d1d8b8b8/events/rpc",
        json,
        &[
            "shelly shellypro4pm-f008d1d8b8b8 2021-09-09T11:22:25.040 component=switch:0 output=true power=8.9 voltage=237.5 \
         energy_total=11.2 temperature=23.5",
            "shelly shellypro4pm-f008d1d8b8b8 2021-09-09T11:22:25.040 component=switch:1 power=0",
        ],
    );
    let event =
        r#"{"src":"s","method":"NotifyEvent","params":{"ts":1631186545.04,"events":[{"id":0,"event":"single_push"}]}}"#;
    check("shelly.toml", "s/events/rpc", event, &[]);
}

#[test]
fn chirpstack() {
    let json = r#"{"deduplicationId":"3ac7e3c4-4401-4b8d-9386-a5c902f9202d","time":"2022-07-18T09:34:15.775023242+00:00",
        "deviceInfo":{"applicationName":"app","deviceName":"well","devEui":"0101010101010101","tags":{"key":"value"}},
        "devAddr":"00189440","dr":1,"fCnt":4,"fPort":1,"confirmed":true,"data":"qg==","object":{"temperature":21.5,"humidity":40},
        "rxInfo":[{"gatewayId":"0016c001f153a14c","uplinkId":4217106255,"rssi":-36,"snr":10.5,"context":"E3OWOQ=="}],
        "txInfo":{"frequency":867100000}}"#;
    check(
        "chirpstack.toml",
        "application/1/device/0101010101010101/event/up",
        json,
        &[
            "lorawan 0101010101010101 2022-07-18T09:34:15.775023 device_name=well f_port=1 f_cnt=4 data_rate=1 rssi=-36 snr=10.5 \
         gateway=0016c001f153a14c temperature=21.5 humidity=40",
        ],
    );
}

#[test]
fn the_things_stack() {
    let json = r#"{"end_device_ids":{"device_id":"dev1","application_ids":{"application_id":"app1"},"dev_eui":"0004A30B001C0530",
        "dev_addr":"00BCB929"},"correlation_ids":["as:up:01E0"],"received_at":"2020-02-12T15:15:45.787Z",
        "uplink_message":{"f_port":1,"f_cnt":7,"frm_payload":"gkHe","decoded_payload":{"temperature":1.0,"luminosity":0.64},
        "rx_metadata":[{"gateway_ids":{"gateway_id":"gtw1"},"rssi":-35,"channel_rssi":-35,"snr":5.2}]}}"#;
    check(
        "the_things_stack.toml",
        "v3/app1@ttn/devices/dev1/up",
        json,
        &[
            "ttn dev1 2020-02-12T15:15:45.787 dev_eui=0004A30B001C0530 f_port=1 f_cnt=7 rssi=-35 snr=5.2 gateway=gtw1 temperature=1",
        ],
    );
    check("the_things_stack.toml", "v3/app1@ttn/devices/dev1/up", r#"{"join_accept":{}}"#, &[]);
}

#[test]
fn ngsi_traffic_flow() {
    let expected = "traffic_flow TrafficFlowObserved-1 2016-12-07T11:15:00 lane=1 direction=forward intensity=197 \
                    occupancy=0.76 average_speed=52.6 average_length=9.87 headway_time=0.5 reversed_lane=false";
    let plain = r#"{"id":"TrafficFlowObserved-1","type":"TrafficFlowObserved","laneId":1,
        "dateObserved":"2016-12-07T11:10:00/2016-12-07T11:15:00","dateObservedTo":"2016-12-07T11:15:00Z",
        "averageHeadwayTime":0.5,"intensity":197,"occupancy":0.76,"averageVehicleSpeed":52.6,"averageVehicleLength":9.87,
        "reversedLane":false,"laneDirection":"forward","location":{"type":"Point","coordinates":[-4.7,41.6]}}"#;
    check("ngsi_key_values.toml", "ngsi/traffic/1", plain, &[expected]);
    let mut entity: serde_json::Map<_, _> = serde_json::from_str(plain).unwrap();
    for (name, value) in entity.iter_mut().filter(|(name, _)| !matches!(name.as_str(), "id" | "type")) {
        *value = serde_json::json!({"type": if name == "intensity" { "Number" } else { "Any" }, "value": value});
    }
    let normalized = serde_json::to_string(&entity).unwrap();
    check("ngsi_normalized.toml", "ngsi/traffic/1", &normalized, &[expected]);
    check("ngsi_normalized.toml", "ngsi/traffic/1", r#"{"id":"x","type":"NoiseLevelObserved"}"#, &[]);
}

#[test]
fn real_payloads_are_read() {
    let Some(data) = shared_data() else { return };
    let telemetry = std::fs::read_to_string(data.join("tasmota/telemetry.ndjson")).unwrap();
    let readings = telemetry.lines().map(|line| read("tasmota.toml", "tele/d/SENSOR", line.as_bytes()).len());
    assert!(readings.sum::<usize>() >= 20);
    for (file, payload) in [
        ("ngsi_normalized.toml", "ngsi/TrafficFlowObserved.example-normalized.json"),
        ("ngsi_key_values.toml", "ngsi/TrafficFlowObserved.example.json"),
    ] {
        let texts = read(file, "ngsi/traffic/1", &std::fs::read(data.join(payload)).unwrap());
        assert!(texts[0].contains("average_speed=52.6") && texts[0].contains("Valladolid"), "{texts:?}");
    }
}
