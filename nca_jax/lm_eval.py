r"""Evaluate a policy on tasks of lm-eval, EleutherAI's harness.

    python -m nca_jax.lm_eval --workdir=DIR --tasks=arc_easy,gsm8k [--out=FILE]
        [--include_path=DIR] [--limit=N] [--num_fewshot=N] [--apply_chat_template] [--step=N|best]

--tasks         names, with commas between them: `lm-eval ls tasks` lists them
--include_path  a folder of task files (YAML) of one's own
--limit         the first N documents of each task; 0: all
--num_fewshot   examples before each question; by default as the task says
--apply_chat_template  asks in the turns of the chat template
--out           JSON: results, versions, n-shot and config, as lm-eval returns them
--workdir       of a training run; without it the model of init_from
--step          of a checkpoint that was kept, or best by checkpoint.best_metric; by default the
                latest
--config        a config file or nca_jax:NAME, with its arguments; by default that of the run in
                --workdir: configs/jsonl.py:files=none,init_from=HF_FOLDER is a model as it is;
                --help_config lists all fields

Wants the extra eval. The numbers are those of lm-eval's own model of transformers in the precision
of config.model.dtype. A context is computed once for all of its choices, and generate.batch_size
says how many answers are sampled at once. Its data sets are read by the library `datasets`.
"""

import json

import jax

from nca_jax import build
from nca_jax.checks import UserError, run_main
from nca_jax.files import out_file, write_json
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed
from nca_jax.infra.progress import phase
from nca_jax.infra.records import date_of
from nca_jax.params import policy_params

WRITTEN = ("results", "groups", "versions", "n-shot", "n-samples", "configs", "config")


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv,
        sections=("generate",),
        tasks=None,
        include_path="",
        limit=0,
        num_fewshot=-1,
        apply_chat_template=False,
        out="",
        workdir="",
        step="",
    )
    # An extra: where it is not there, that is said.
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        handle_non_serializable,
        make_table,
    )

    from nca_jax.harness import Policy

    out = out_file(flags.out) if flags.out else None
    with phase("looking for the tasks"):
        manager = TaskManager(include_path=flags.include_path or None)
    asked = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    tasks = manager.match_tasks(asked)
    if unknown := [name for name in asked if not manager.match_tasks([name])]:
        raise UserError(
            f"--tasks={','.join(unknown)}: lm-eval has none of that name; `lm-eval ls tasks` lists "
            "its own, and --include_path is a folder of others."
        )
    run = build.build(config, date=date_of(flags.workdir))
    with jax.set_mesh(run.mesh):
        policy = Policy(run, policy_params(run, flags.workdir, flags.step))
        found = simple_evaluate(
            model=policy,
            tasks=tasks,
            num_fewshot=None if flags.num_fewshot < 0 else flags.num_fewshot,
            limit=flags.limit or None,
            apply_chat_template=flags.apply_chat_template,
            task_manager=manager,
            log_samples=False,
        )
    if not distributed.is_first():
        return 0
    if out is not None:
        kept = {name: found[name] for name in WRITTEN if name in found}
        write_json(out, json.loads(json.dumps(kept, default=handle_non_serializable)))
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    if out is not None:
        print(f"written to {out}")
    return 0


if __name__ == "__main__":
    run_main(distributed.together(main))
