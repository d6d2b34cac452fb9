# One rule for each stage. `corec run params/ml-100k.yaml` calls Snakemake with it; by hand:
#   snakemake --profile profiles/local --config params=params/ml-100k.yaml
#
# The wildcard of a stage that runs share is the key of its parameters and of those of all stages before it, so that no stage is
# computed twice. Seed and protocol are parameters, and so part of the key. A study or the figures have the wildcard `run`.
import json
import shlex
import sys

from pathlib import Path

from corec import stages
from corec import grid as grids
from corec import workflow as graph  # Snakemake has a variable `workflow`

TARGETS = graph.read_config(config)
PLAN = graph.plan(TARGETS)
PYTHON = shlex.quote(sys.executable)
GIVEN = json.dumps(dict(config))


wildcard_constraints:
    key="[0-9a-f]{16}",
    run="[A-Za-z0-9][A-Za-z0-9._-]*",


LEAVES = [record for record in PLAN if not any(record in job.needs for job in PLAN.values())]
FIGURES = [record for record, job in PLAN.items() if job.stage == "figures"]
TABLE = [str(grids.folder(Path(config["grid"])) / "grid.csv")] if "grid" in config else []


rule all:
    input:
        LEAVES,
        TABLE,


if TABLE:

    rule table:
        input:
            FIGURES,
        output:
            TABLE[0],
        shell:
            "exec {PYTHON} -m corec.grid {config[grid]:q}"


for stage in stages.NOTEBOOKS:

    rule:
        name:
            stage
        input:
            lambda wildcards, path=graph.pattern(stage): PLAN[path.format(**wildcards)].needs,
        output:
            graph.pattern(stage),
        priority: len(stages.NOTEBOOKS) - list(stages.NOTEBOOKS).index(stage)  # the stages of the paper first
        params:
            digest=lambda wildcards, path=graph.pattern(stage): PLAN[path.format(**wildcards)].digest,
        shell:
            "exec {PYTHON} -m corec.workflow {output} {GIVEN:q}"
