#!/usr/bin/env bash
# All evidence of the README, at one commit: hours on two cores.
#
#     bash tests/bench_all.sh              # in the environment of requirements.txt
#     bash tests/bench_all.sh pipeline     # only what is named so
#
# What the runs leave lies in evidence/<commit>; stopped and called again, this begins with the piece that was stopped. The
# tables, curves and pictures go to .github/results; what is written there by hand, around a table, stays.
set -euo pipefail
only=${1:-}
root=$(cd "$(dirname "$0")/.." && pwd)
bench_pipeline() { PYTHONPATH=$root:$root/tests python -c "import bench_pipeline; print(bench_pipeline.$1())"; }
git -C "$root" diff --quiet HEAD -- ':(glob)*.py' requirements.txt || { echo "the scripts are not as committed"; exit 1; }
commit=$(bench_pipeline commit)
results=$root/.github/results
mkdir -p "$results" "$root/evidence/$commit" && cd "$root/evidence/$commit"

once() {  # NAME COMMAND...: not again once it has ended well
    if [[ -e $1.done || $1 != "$only"* ]]; then return; fi
    mkdir -p "$(dirname "$1")"
    echo "$(date +%H:%M) $1: ${*:2}"
    "${@:2}" > "$1.out" 2> "$1.err" || { tail -n 3 "$1.err"; exit 1; }
    bench_pipeline machine > "$1.done"
}

table() {  # NAME COMMAND...: what it prints, with command, machine and commit, goes between the marks of NAME.md
    once "$@"
    if [[ $1 != "$only"* ]]; then return; fi
    printf '`bash tests/bench_all.sh %s`, on %s:\n\n%s\n\n' "$1" "$(< "$1.done")" "$(< "$1.out")" > "$1.block"
    [[ -e $results/$1.md ]] || printf '<!-- bench -->\n<!-- end -->\n' > "$results/$1.md"
    sed -i -e '/^<!-- bench -->$/,/^<!-- end -->$/{//!d}' -e "/^<!-- bench -->\$/r $1.block" "$results/$1.md"
}

copy() { if [[ $1 == "$only"* ]]; then cp "$2" "$results/$3"; fi; }  # NAME FILE TO
last() { ls -d "$@" 2> /dev/null | tail -n 1; }
parts() { local IFS=,; echo "$*"; }  # of a run that was continued
run() { python "$root/$1.py" "${@:2}"; }
bench() { python "$root/tests/$1.py" "${@:2}"; }
collect() { rm -rf "$1" && run ppo_collect --save-dir "$@"; }  # frames of a run that was stopped would count

table environment bench bench_env
table cameras bench compare_cameras "$results/cameras.jpg"
table pipeline bench bench_pipeline --seeds 1 2 3
copy pipeline pipeline/results.json pipeline.json
once overview bench draw_overview pipeline/seed_1 "$root/.github/overview.gif"
once learning bench plot_runs learning --tags env/success_once env/episode_len -- \
    "stage 1, seed 1=$(parts pipeline/seed_1/logs/*-ppo_collect)" "stage 3, seed 1=$(parts pipeline/seed_1/logs/*-ppo_dense)" \
    "stage 3, seed 2=$(parts pipeline/seed_2/logs/*-ppo_dense)" "stage 3, seed 3=$(parts pipeline/seed_3/logs/*-ppo_dense)" \
    "stage 4, seed 1=$(parts pipeline/seed_1/logs/*-ppo_resnet_reward)"
table seeds bench bench_seeds --env-steps 640000 --curves "$results/seeds.csv"
copy seeds seeds/seeds.png seeds.png
table pictures bench bench_pictures --settings PushCube --counts 40 100 300  # what README says; without flags many hours
copy pictures pictures/pictures.csv pictures.csv

# Other tasks
for task in PushCube PullCube; do
    table "task_$task" bench bench_pipeline --out "$task" --seeds 1 \
        --flags 1 "--env-id $task-v1 --target-success 1500 --target-failure 1500" --flags 3 "--env-id $task-v1"
    copy "task_$task" "$task/results.json" "task_$task.json"
done
once task_StackCube/run run ppo_dense --env-id StackCube-v1 --num-iterations 640 --log-dir task_StackCube/logs
table task_StackCube bench plot_runs task_StackCube --tags eval/success_once env/success_once env/return -- \
    "stage 3=$(last task_StackCube/logs/*)"

# An arm that people own: the module and the commands of so100.md
servo=(--env-id so100:PickCubeServo-v1 --control-mode pd_joint_target_delta_pos)
frames=("${servo[@]}" --target-success 1500 --target-failure 1500)
so100() { sed -n '/^```python/,/^```$/{//!p}' "$results/so100.md" > so100/so100.py && (cd so100 && "$@"); }
once so100/stage_1 so100 collect data "${frames[@]}"
once so100/stage_2 so100 run train_reward_resnet
once so100/stage_3 so100 run ppo_dense "${servo[@]}"
once so100/stage_4 so100 run ppo_resnet_reward "${servo[@]:0:2}" --resume-dir "$(last "$PWD"/so100/logs/*-ppo_dense)"
once so100/fresh so100 collect fresh "${frames[@]}" --seed 2 --log-dir fresh
once so100/scored so100 run train_reward_resnet --evaluate reward_checkpoints --data-path fresh --save-dir fresh
table so100 bench plot_runs so100 --film --tags env/success_once env/episode_len reward_model/precision eval/success_once \
    eval/episode_len -- "stage 1=$(last so100/logs/*-ppo_collect)" "stage 3=$(last so100/logs/*-ppo_dense)" \
    "stage 4=$(last so100/logs/*-ppo_resnet_reward)"

# Nothing privileged: from the pipeline's first policy, with its classifier
stage_4() { run ppo_resnet_reward --resume-dir pipeline/seed_1/logs/*-ppo_dense --reward-checkpoint pipeline/seed_1/reward_checkpoints "$@"; }
once privileged/resnet stage_4 --done-by resnet --log-dir privileged/resnet
once privileged/oracle stage_4 --oracle --log-dir privileged/oracle
table privileged bench plot_runs privileged --tags env/success_once env/episode_len reward_model/precision eval/success_once \
    eval/episode_len -- "simulator ends=$(parts pipeline/seed_1/logs/*-ppo_resnet_reward)" "ResNet ends=$(last privileged/resnet/*)" \
    "oracle=$(last privileged/oracle/*)"

# A hacked reward: a ResNet bad on purpose, and what its mistakes teach it
hack() { run ppo_resnet_reward --seed 7 --resume-dir hacked/policy --reward-checkpoint "$1" --done-by resnet --score-every 10 \
    --threshold 0.5 --clip-coef 0.2 --critic-warmup 10 --num-iterations 60 --save-mistakes --log-dir "$1/logs"; }
learn() { run train_reward_resnet --data-path hacked/few "${@:2}" --save-dir "$1"; }
once hacked/policy run ppo_dense --seed 7 --log-dir hacked/policy
once hacked/few collect hacked/few --camera workspace --target-success 150 --target-failure 150
once hacked/bad_model learn hacked/bad
once hacked/bad_run hack hacked/bad
once hacked/mended_model learn hacked/mended "$(last hacked/bad/logs/*/mistakes)"
once hacked/mended_run hack hacked/mended
once hacked/again_model learn hacked/again "$(last hacked/bad/logs/*/mistakes)" "$(last hacked/mended/logs/*/mistakes)"
once hacked/again_run hack hacked/again
table hacked bench plot_runs hacked --tags reward_model/precision env/success_once eval/success_once -- \
    "150 pictures a class=$(last hacked/bad/logs/*-ppo_resnet_reward)" \
    "and its mistakes=$(last hacked/mended/logs/*-ppo_resnet_reward)" "a second time=$(last hacked/again/logs/*-ppo_resnet_reward)"
