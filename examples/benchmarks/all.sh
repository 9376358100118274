#!/usr/bin/env bash
# Measure again what README and docs/benchmarks.md report, on the GPU at hand: JSON files into results/.
#
#     examples/benchmarks/all.sh [OUT] PART...      parts: attention selection matched training step models quality observed peers cost
#
# MINI=FILE names the weights of a larger model for the parts "matched", "quality", "observed" and "peers"; without it they
# take the model that comes with the examples. Nothing else should run on the card beside the timed parts. Then: tables.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=examples/benchmarks/results
if [[ ${1:-} == */* ]]; then OUT=$1; shift; fi
[[ $# -gt 0 ]] || { sed -n '2,7p' "${BASH_SOURCE[0]}"; exit 2; }
mkdir -p "$OUT"
bench() { python -P -m fg_inductor bench "$@"; }

attention() {
  bench attention --slice 128x1 128x8 128x16 64x1 --density 0.1 0.3 1.0 --tail none pooled \
    --baselines cudnn fa2 --json "$OUT/attention_hopper_wan2.1-1.3b-480p.json"
}
selection() {
  bench attention --slice 128x1 128x8 128x16 64x1 16x16 64x64 --density 0.3 --phases --top-p 0.9 \
    --json "$OUT/attention_hopper_selection.json"
  bench attention --preset wan2.1-14b-720p --slice 128x1 128x8 128x16 64x64 --density 0.3 --phases --top-p 0.9 \
    --json "$OUT/attention_hopper_selection_14b-720p.json"
}
training() {
  bench training --parts attention --slice 128x1 128x8 128x16 128x64 --density 0.3 --json "$OUT/training_attention.json"
}
step() {
  bench training --parts step --slice 128x16 --density 0.3 --layers 4 --json "$OUT/training_step.json"
}
models() {
  for preset in wan2.1-1.3b-720p wan2.1-14b-480p wan2.1-14b-720p cogvideox-5b; do
    bench model --preset "$preset" --baselines best --json "$OUT/model_$preset.json"
  done
  bench model --preset hunyuanvideo-720p --baselines best --layers 1 2 --json "$OUT/model_hunyuanvideo-720p.json"
}
# Videos: 8 of each method, and the curves of 2.
drawn() { python -P examples/quality.py --out "$OUT/$1" "${@:2}"; rm "$OUT/$1.png"; }
mini() { drawn "$@" --frames 17 ${MINI:+--weights "$MINI" --side 256}; }
quality() {
  local prompts=(--source gh_sam2_01_dog kivy_cityCC0 --seeds 0 1 2 3 --density 0.15 0.3)
  local methods=(means "means, tail" "means, time step 0.5" "means, tail, time step 0.5"
    "128x1, one mean, no order" "64x64 blocks" observed "observed, tail")
  drawn quality_tiny --steps 16 --dense-first 0.1875 "${prompts[@]}" --methods "${methods[@]}"
  mini quality_mini --steps 20 "${prompts[@]}" --methods "${methods[@]}"
  mini quality_curves --steps 32 --source gh_sam2_01_dog --seeds 0 1 --density 0.1 0.2 0.3 0.5 \
    --methods "${methods[@]}" dfs
}
observed() {
  bench observed --slice 128x8 128x16 128x1 64x8 --json "$OUT/observed_masks.json"
  mini quality_refresh_period --steps 32 --source gh_sam2_01_dog --seeds 0 1 --density 0.15 0.3 \
    --methods means observed "observed, every 8" "observed, every 16" "observed, once"
  local fewer=(--source gh_sam2_01_dog kivy_cityCC0 --seeds 0 1 --density 0.15 0.3
    --methods observed "observed, 2 heads a mask" "observed, 128x32")
  drawn quality_state_tiny --steps 16 --dense-first 0.1875 "${fewer[@]}"
  mini quality_state_mini --steps 20 "${fewer[@]}" "observed, 4 heads a mask" "observed, 128x64"
}
# On q, k and v of layers of a trained model: trained LAYERS -- COMMAND..., which is given --qkv and --grid.
trained() {
  local qkv layers=() frames=16 side=192
  while [[ $1 != -- ]]; do layers+=("$1"); shift; done
  qkv=$(mktemp --suffix .safetensors)
  if [[ ${MINI:-} ]]; then frames=17 side=256; fi
  python -P examples/quality.py ${MINI:+--weights "$MINI"} --frames $frames --side $side --layer "${layers[@]}" \
    --qkv "$qkv"
  "${@:2}" --qkv "$qkv" --grid $frames $((side / 8)) $((side / 8))
  rm "$qkv"
}
matched() {
  local small=(--slice 16x16 16x8 16x1 32x16 32x1 --density 0.1 0.3 --kernel hopper)
  trained 1 2 3 -- bench attention "${small[@]}" --json "$OUT/attention_matched_slices.json"
  trained 1 2 3 -- bench attention "${small[@]}" --no-order --json "$OUT/attention_matched_slices_no_order.json"
}
peers() {
  bench peers --density 0.1 0.3 --json "$OUT/peers.json" --png examples/assets/peers.png
  trained 1 -- bench peers --density 0.1 0.2 0.3 --order --json "$OUT/peers_trained.json"
}
cost() {
  bench cost --anew --json "$OUT/cost.json"
}

for part in "$@"; do
  case $part in
    attention | selection | matched | training | step | models | quality | observed | peers | cost) "$part" ;;
    *) echo "all.sh: there is no part named $part"; exit 2 ;;
  esac
done
