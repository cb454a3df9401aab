#!/usr/bin/env bash
# Takes the guards out, one at a time, and shows that a test then fails. For people, on demand: tests/mutants.sh [NAME…]
#
# Each mutant is a copy of the last commit with one line changed. It is killed when the named test fails, and survives
# when it passes; a survivor ends the script with 1. Dependencies are built once, in CARGO_TARGET_DIR if that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$scratch/target} RUST_BACKTRACE=0
survivors=0

# mutant NAME FILE SED-SCRIPT TEST-ARGUMENTS…
mutant() {
    local name=$1 file=$2 script=$3
    shift 3
    if [ ${#wanted[@]} -gt 0 ] && ! printf '%s\n' "${wanted[@]}" | grep -qx -- "$name"; then return; fi
    rm -rf "$scratch/tree"
    mkdir "$scratch/tree"
    git archive HEAD | tar -x -C "$scratch/tree"
    sed -i -E "$script" "$scratch/tree/$file"
    if git diff --no-index --quiet "$file" "$scratch/tree/$file"; then
        echo "$name: the line that it changes is gone"
        survivors=1
        return
    fi
    if ! (cd "$scratch/tree" && cargo test --locked --no-run "$@" >"$scratch/log" 2>&1); then
        echo "$name: does not build"
        tail -20 "$scratch/log"
        survivors=1
    elif (cd "$scratch/tree" && cargo test --locked "$@" >"$scratch/log" 2>&1); then
        echo "$name: SURVIVED"
        survivors=1
    else
        echo "$name: killed by $(grep -m1 -E '^test .* FAILED' "$scratch/log" || tail -1 "$scratch/log")"
    fi
}

wanted=("$@")
mutant log-file-sync segment-log/src/log.rs 's/^    file\.sync_data\(\)$/    let _ = file; Ok(())/' -p segment-log --test power_cut
mutant log-directory-sync segment-log/src/log.rs 's/^    layer\.sync_dir\(directory\)$/    let _ = (layer, directory); Ok(())/' -p segment-log --test power_cut
mutant number-before-sync edge-agent/src/spool.rs 's/self\.lanes\[lane\]\.log\.sync\(\)\?; \/\/ numbered before sent/let _ = lane;/' -p edge-agent --lib spool
mutant store-file-sync cloud-ingest/src/store/files.rs 's/let result = file\.sync_data\(\);/let _ = \&file; let result = std::io::Result::Ok(());/' --workspace --lib store
mutant store-directory-sync cloud-ingest/src/store/files.rs 's/let result = self\.layer\.sync_dir\(directory\);/let _ = directory; let result = std::io::Result::Ok(());/' --workspace --lib store
mutant txn-check cloud-ingest/src/delta.rs 's/if \*first <= committed \{/if false {/; s/if \*first != committed\.next\(\) \|\| last\.seq < \*first \{/if false {/' --workspace --lib delta
mutant cloud-ack-before-sync cloud-ingest/src/wal.rs 's/^        self\.log\.sync\(\)\.map\(\|_\| \(\)\)$/        Ok(())/' --workspace --lib ingest::tests::what_was_acknowledged
mutant look-before-gap cloud-ingest/src/ingest/admit.rs 's/^ *Verdict::Gap \{ \.\. \} \| Verdict::Forked if looked.*$//' --workspace --lib ingest::tests::two_nodes
mutant carry-off cloud-ingest/src/ingest.rs 's/^        self\.carry\(pins\)\?;$/        let _ = pins;/' --workspace --lib ingest::tests::a_stream_that_cannot_commit
mutant edge-ack-before-sync edge-agent/src/journal.rs 's/let end = self\.log\.sync\(\)\?; \/\/ before acknowledged/let end = if to - from > 64 { self.log.sync()? } else { self.log.synced() };/' --workspace --test weir nothing_is_lost_or_doubled_when_the_edge_agent_is_killed
mutant redelivery-list-off edge-agent/src/redelivery.rs 's/^        if !dup \{$/        if dup || !dup {/' --workspace --test weir nothing_is_lost_or_doubled_when_the_edge_agent_is_killed
exit $survivors
