from pathlib import Path

import pytest
from qlib.cli.run import render_template
from qlib.utils.data import update_config
from ruamel.yaml import YAML

from qlib_ext.workflow import load_workflow, parse_yaml

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


def as_qrun(path):
    """What `qlib.cli.run.workflow` makes of a file."""
    load = YAML(typ="safe", pure=True).load
    config = load(render_template(str(path)))
    base = config.pop("BASE_CONFIG_PATH", None)
    if base is None:
        return config
    return update_config(load((path.parent / base).read_text()), config)


@pytest.mark.parametrize("name", ["gru", "mamba_moe", "rnn_day_multi", "base_enhance"])
def test_bundled_files_read_as_qrun_reads_them(name):
    path = WORKFLOWS / f"{name}.yaml"
    assert load_workflow(path) == as_qrun(path)


def test_numbers_are_yaml_1_2(tmp_path):
    file = tmp_path / "w.yaml"
    file.write_text("lr: 2e-4\non: yes\n")
    assert load_workflow(file) == {"lr": 2e-4, "on": "yes"} == as_qrun(file)


def test_placeholders_take_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "w.yaml"
    file.write_text(
        "a: {{ HERE }}\nb: {{ ABSENT | default('x') }}\nn: {{ 2 * 3 }}\n"
        "{% set root = HERE + '/store' %}{% if HERE %}c: {{ root }}{% endif %}\n"
        "d: [{% for i in range(3) %}{{ i }},{% endfor %}]\n"
    )
    monkeypatch.setenv("HERE", "there")
    want = {"a": "there", "b": "x", "n": 6, "c": "there/store", "d": [0, 1, 2]}
    assert load_workflow(file) == want == as_qrun(file)


@pytest.mark.parametrize(
    "text",
    [
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{% for i in range(99999) %}{% for j in range(999) %}aaaa{% endfor %}"
        "{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ '%0999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set a = 'aa' %}" + "{% set a = a + a %}" * 40 + "{{ a }}",
        "{% set a = ['aa'] %}" + "{% set a = [a, a] %}" * 40 + "{{ a }}",
        "{% set a = 'aa' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}",
        "{% set a = 'aa' %}" + "{% set a = {'a': a, 'b': a} %}" * 40 + "{{ a|length }}",
        "{% set a = [1] %}" + "{% set a = [[a, a]][0] %}" * 40 + "{{ a == a }}",
        "{% set a = '<' %}" + "{% set a = a | tojson %}" * 40 + "{{ a }}",
        "{% for i in range(99999) %}{% if i < 0 %}{% endif %}{% endfor %}" * 200,
        "{% set a = 'aaaa' * 1 %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_foreign_file_runs_nothing_and_stays_small(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.yaml").write_text(f'a: "{text}"\n')
    with pytest.raises(ValueError, match=r"w\.yaml: its Jinja"):
        load_workflow("w.yaml")
    assert not (tmp_path / "PWNED").exists()


def test_aliases_are_bounded_and_circles_refused():
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    with pytest.raises(ValueError, match="once its aliases"):
        parse_yaml(bomb, "f")
    keys = ", ".join(f"k{i}: 1" for i in range(10))
    merged = f"a0: &a0 {{{keys}}}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
    )
    with pytest.raises(ValueError, match="once its aliases"):
        parse_yaml(merged, "f")
    with pytest.raises(ValueError, match="holds itself"):
        parse_yaml("a: &a [*a]", "f")
    with pytest.raises(ValueError, match="f is no valid YAML"):
        parse_yaml("a: [1", "f")
    with pytest.raises(ValueError, match="f is no valid YAML"):
        parse_yaml("!!python/object/apply:os.system [true]", "f")


def test_a_base_with_a_base_names_the_cause(tmp_path):
    (tmp_path / "a.yaml").write_text("BASE_CONFIG_PATH: b.yaml\n")
    (tmp_path / "b.yaml").write_text("BASE_CONFIG_PATH: c.yaml\n")
    with pytest.raises(ValueError, match="one level deep"):
        load_workflow(tmp_path / "a.yaml")


def test_what_cannot_be_read_is_named_and_never_read_whole(tmp_path):
    file, base = tmp_path / "w.yaml", tmp_path / "base.yaml"
    for content, words in (
        ("a: é".encode("latin-1"), r"w\.yaml is not UTF-8"),
        (b"a: 2021-99-99", r"w\.yaml is no valid YAML: month"),
        (b"a: " + b"9" * 5000, r"w\.yaml is no valid YAML: .*digits"),
        (b"BASE_CONFIG_PATH: [a]", r"`BASE_CONFIG_PATH` of .*w\.yaml must be a path"),
        (
            b"BASE_CONFIG_PATH: base.yaml",
            r"base\.yaml has more than 300,000 characters",
        ),
    ):
        file.write_bytes(content)
        with base.open("wb") as hole:
            hole.truncate(1 << 40)
        with pytest.raises(ValueError, match=words):
            load_workflow(file)
