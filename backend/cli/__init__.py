"""The command line, `python -m backend <command>`.

main           the commands and their options; each option is a setting or belongs to one command
supervisor     `serve`: web front, all workers and a private Redis as one group; temporary workers for `label`
process_group  child processes that are started, restarted and stopped together
welcome        what `serve` prints once a worker is ready
check          `check`: one line for each thing that must work
label          `label`: a folder of images becomes a dataset, and a killed run resumes
failures       `failures`: the tasks whose predictions were given up
preannotate    `preannotate`: a whole project, with a progress bar
versions       `versions list|show|promote|rollback`, and the progress of `train`

Begin with `main`. May import every other room but `demo`. `supervisor` must never load torch, and `main` loads what is
heavy (torch, numpy, Pillow) only inside the commands that need it.
"""
