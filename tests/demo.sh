#!/usr/bin/env bash
# The whole path on a small synthetic cohort, each step the documented script: slides, patches, stores, training,
# test result. Everything lies in demo/ afterwards and is made anew. `make demo` calls this with PYTHON set.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON="${PYTHON:-python3}"
out=demo

step() {
    echo
    echo "== [$((SECONDS / 60)) min $((SECONDS % 60)) s] $1"
}

patch() { # NAME SIZE: coordinates and store of the patches of SIZE level-0 px, stored as 64 px
    "$PYTHON" CLAM/create_patches_fp.py --source "$out/slides" --save_dir "$out/$1" \
        --patch_size "$2" --step_size "$2" --patch_level 0 --preset bwh_biopsy.csv --seg --patch --stitch
    "$PYTHON" CLAM/save_patches.py --data_h5_dir "$out/$1" --data_slide_dir "$out/slides" --slide_ext .tif \
        --csv_path "$out/$1/process_list_autogen.csv" --patch_dir "$out/$1" --lmdb_name "$1_64" \
        --save_lmdb --img_size 64 --batch_size 256 --workers 2
}

rm -rf "$out"
step "slides: two classes, 30 patients, two slides each"
"$PYTHON" tests/cohort.py "$out"

step "patches and store, high magnification: 64 px of level 0"
patch high 64
step "patches and store, low magnification: 128 px of level 0, stored as 64 px"
patch low 128

# Two processes on the CPU, one per GPU elsewhere; more than two would leave this cohort too few steps per epoch.
processes=$("$PYTHON" -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')
step "training end to end in $processes processes"
bash train_dist.sh "$processes" -c config/demo.yaml --model=e2e_r18_abmilx --no_enc_pt \
    --dataset_root="$out/high/high_64.lmdb" --dataset_sub_root="$out/low/low_64.lmdb" \
    --csv_path="$out/labels.csv" --output_path="$out/results" --project=demo --title=r18_abmilx

step "done: $out/results/demo/r18_abmilx/results.json, and the slides on $out/high/cohort.html"
