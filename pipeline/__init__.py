"""The stage graph and the command line.

config.py      all settings of a run; typed overrides
presets.py     named settings that derive from each other
stages.py      the graph, as data
workspace.py   what lies where in a work folder
planning.py    run, resume or skip each stage, and why
runner.py      execute a plan
named_teachers.py  the teachers that a command names
provenance.py  who made a result: command, code version, machine
progress.py    progress on a terminal or in a log file
demo_data.py   the demo's photographs as a folder of class folders
teacher_table.py   the table of teachers as text
precision_table.py  what each precision of a teacher changes
tables.py      results to a table on the screen
pictures.py    curves and token pictures for the report
report.py      the report stage: one self-contained HTML page
screen.py      what a command shows: the plan, the table
estimate.py    how long an extraction would take: a trial of it
store_status.py  how far the stores are that are being filled
audit.py       random records of stores, made again by their teachers
repair.py      which shards of a store are damaged, and how they are made again
store_commands.py  verify, repair, convert, upload, join
export_commands.py  export, import
options.py     the words of the command line
settings.py    where a command's settings come from
cli.py         the commands
"""
