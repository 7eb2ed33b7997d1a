import pytest

from proximo.report import folder, pictures, report


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures that are empty but for the mark of who made them: drawing takes seconds, and is tested once."""

    def mark_only(figure):
        return folder._PICTURE_MARK

    monkeypatch.setattr(pictures, "png_bytes", mark_only)
    monkeypatch.setattr(pictures, "_draw_panel", lambda axis, panel, records: None)


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports whose only picture is an empty file."""

    def one_file(records, target):
        path = target / "overview.png"
        path.write_bytes(folder._PICTURE_MARK)
        return [path]

    monkeypatch.setattr(report, "draw_records", one_file)
