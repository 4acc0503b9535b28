#!/usr/bin/env bash
# Sets up if needed, then trains KernelWarehouse on the embedded digits and evaluates the best checkpoint.
#
#   bash scripts/demo.sh [OUTPUT_DIR]        # output/digits by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/digits/kw1x_resnet18.json
output=${1:-output/digits}

bash scripts/setup.sh --no-detection
SECONDS=0

# A demo starts afresh: with the files of the run before, main.py would resume it and have nothing left to do.
# Only the files of such a run are removed, as OUTPUT_DIR may be any folder.
rm -f "$output"/checkpoint-*.pth "$output"/{log.txt,curves.png,report.json,report.html,eval.txt}

.venv/bin/python main.py --kw_config "$config" --output_dir "$output"
echo
echo "demo.sh: evaluating $output/checkpoint-best.pth"
.venv/bin/python main.py --kw_config "$config" --eval true --resume "$output/checkpoint-best.pth" | tee "$output/eval.txt"

echo
echo "demo.sh: done in $SECONDS s"
echo "  accuracy    $(grep -F '* Acc@1' "$output/eval.txt")"
echo "  log         $output/log.txt"
echo "  curves      $output/curves.png"
echo "  report      $output/report.html"
echo "  checkpoint  $output/checkpoint-best.pth"
