use jepsen::sim::{Plan, run};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let seed: u64 = args[1].parse().unwrap();
    let count: u64 = args.get(2).map_or(1, |n| n.parse().unwrap());
    let sab: Vec<boomerang::sabotage::Fault> =
        args.get(3).map_or(vec![], |s| s.split(',').filter(|s| !s.is_empty()).map(|f| f.parse().unwrap()).collect());
    if std::env::var("LOG").is_ok() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_env("LOG"))
            .with_writer(std::io::stderr)
            .init();
    }
    for s in seed..seed + count {
        let began = std::time::Instant::now();
        let plan = Plan { sabotage: sab.clone(), ..Plan::of(s) };
        let outcome = run(s, &plan);
        let end = outcome.history.events.last().map_or(0, |e| e.at_us);
        println!(
            "seed {s}: {} events, {:.1} s simulated, {:?} cpu, hash {:016x}, {}",
            outcome.history.events.len(),
            end as f64 / 1e6,
            began.elapsed(),
            outcome.hash(),
            if outcome.holds() { "holds" } else { "BROKEN" }
        );
        for v in &outcome.verdicts {
            if !v.holds() || std::env::var("V").is_ok() {
                println!("   {} {:?}", v.checker, v.counts);
                for x in v.violations.iter().take(4) {
                    println!("      {} {:?}", x.what, x.events);
                }
            }
        }
        if let Ok(n) = std::env::var("DUMP") {
            let mut f = std::fs::File::create(n).unwrap();
            use std::io::Write;
            for (i, e) in outcome.history.events.iter().enumerate() {
                writeln!(f, "{i} {:.3} {:?}", e.at_us as f64 / 1e6, e.what).unwrap();
            }
        }
    }
}
