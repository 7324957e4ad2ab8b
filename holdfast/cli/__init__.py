"""The command line: joins what `esxi` reads and writes with what `repo` keeps.

`entry` starts it, `supervise` watches over it, `app` knows the commands, `commands/` holds one module per
command. Everything heavy is imported inside of the command that needs it: `holdfast version` loads none of it.
"""
