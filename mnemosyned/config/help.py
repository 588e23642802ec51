"""What users read of the flags: `-help`, the table of docs/flags.md, and completion for bash and zsh."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from mnemosyned.config.flags import ACTIONS, ENV_PREFIX, Flag, Section, flags_by_name, flags_of

_USAGE: Final = """usage: mnemosyned [flags]
       mnemosyned <command> [-help]

commands:
{commands}
A flag takes one dash or two, and its value behind = or a space: -ttl 24m, --ttl=24m.
A flag may also come from its environment variable or from a file (-config). The command line wins
over the environment, the environment over the file, the file over the default.
Durations are Go's (24m, 1h30m, 500ms); sizes take KiB, MiB, GiB.
"""


def actions_in(argv: Sequence[str]) -> set[str]:
    """Return which of `help` and `version` the arguments ask for."""
    action_by_spelling = {f"{dash}{name}": name for dash in ("-", "--") for name in ("help", "version")}
    action_by_spelling |= {"-h": "help", "--h": "help"}
    return {action_by_spelling[argument] for argument in argv if argument in action_by_spelling}


def help_text(sections: Sequence[type[Section]], commands: Mapping[str, str]) -> str:
    """Return what `-help` prints: the flags in groups, each group with an example."""
    width = max(map(len, commands))
    lines = [
        _USAGE.format(commands="".join(f"  {name:<{width}}  {text}\n" for name, text in commands.items()))
    ]
    for section in sections:
        lines += [f"{section.TITLE}", f"  example: {section.EXAMPLE}", ""]
        for flag in flags_of(section).values():
            default = f" (default: {flag.default})" if flag.default else ""
            lines += [f"  -{flag.name}", f"        {flag.meaning}{default} [{flag.variable}]"]
        lines.append("")
    lines.append("Other flags")
    for name, meaning in ACTIONS.items():
        lines += [f"  -{name}", f"        {meaning}"]
    return "\n".join(lines) + "\n"


def flag_table(sections: Sequence[type[Section]]) -> str:
    """Return the flags as a Markdown table."""
    rows = ["| flag | default | environment | meaning |", "|---|---|---|---|"]
    for flag in flags_by_name(sections).values():
        default = f"`{flag.default}`" if flag.default else ""
        rows.append(f"| `-{flag.name}` | {default} | `{flag.variable}` | {flag.meaning} |")
    rows.append(f"| `-config` | | `{ENV_PREFIX}CONFIG` | {ACTIONS['config']} |")
    rows += [f"| `-{name}` | | | {ACTIONS[name]} |" for name in ("help", "version")]
    return "\n".join(rows) + "\n"


def completion_script(shell: str, sections: Sequence[type[Section]], commands: Collection[str]) -> str:
    """Return a script that completes flags, their words and commands; `shell` is bash or zsh."""
    flags = list(flags_by_name(sections).values())
    words = [*(f"-{flag.name}" for flag in flags), *(f"-{name}" for name in ACTIONS)]
    choices = [flag for flag in flags if flag.choices or flag.is_boolean]
    files = [f"-{flag.name}" for flag in flags if _names_a_file(flag)]
    script = _BASH if shell == "bash" else _ZSH
    return (
        script.replace("@FLAGS@", " ".join(words))
        .replace("@COMMANDS@", " ".join(commands))
        .replace("@FILES@", "|".join([*files, "-config", "-postgres.bin"]))
        .replace("@CHOICES@", "".join(_choice_case(shell, flag) for flag in choices))
    )


def _names_a_file(flag: Flag) -> bool:
    return flag.name.endswith((".file", ".crt", ".key", ".ca", ".keys"))


def _choice_case(shell: str, flag: Flag) -> str:
    words = " ".join(flag.choices or ("true", "false"))
    values = f'words="{words}"' if shell == "bash" else f"values=({words})"
    return f"    -{flag.name}) {values} ;;\n"


# Flags are completed with one dash; bash splits a word at =, so the value is a word of its own there.
_BASH: Final = """# bash completion for mnemosyned: source <(mnemosyned completion bash)
_mnemosyned() {
  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=""
  [ "$current" = "=" ] && current=""
  [ "$previous" = "=" ] && previous="${COMP_WORDS[COMP_CWORD-2]}"
  case "${previous/#--/-}" in
@CHOICES@    @FILES@)
      # shellcheck disable=SC2207
      COMPREPLY=($(compgen -f -- "$current")); return ;;
  esac
  [ -z "$words" ] && words="@FLAGS@"
  [ "$COMP_CWORD" -eq 1 ] && words="$words @COMMANDS@"
  # shellcheck disable=SC2207
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -F _mnemosyned mnemosyned
"""
_ZSH: Final = """#compdef mnemosyned
# zsh completion for mnemosyned: source <(mnemosyned completion zsh)
_mnemosyned() {
  local previous="${words[CURRENT-1]}" prefix=""
  local -a values
  if [[ "$PREFIX" == -*=* ]]; then
    previous="${PREFIX%%=*}"; compset -P '*='
  fi
  case "${previous/#--/-}" in
@CHOICES@    @FILES@) _files; return ;;
  esac
  if (( ! ${#values} )); then
    values=(@FLAGS@)
    (( CURRENT == 2 )) && values+=(@COMMANDS@)
  fi
  compadd -- $values
}
if (( $+functions[compdef] )); then compdef _mnemosyned mnemosyned; fi
"""
