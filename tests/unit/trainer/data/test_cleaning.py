"""Cleaning goes by its written rules, never by a text's script."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.cleaning import CleaningCounts, Copies, candidates, changed, normalise

SENTENCES = {
    "English": "The nurse brought warm tea at seven and opened the window of the room. ",
    "Russian": "Медсестра принесла тёплый чай в семь часов и открыла окно в палате. ",
    "Greek": "η νοσοκόμα έφερε ζεστό τσάι στις επτά και άνοιξε το παράθυρο του δωματίου. ",
    "Arabic": "أحضرت الممرضة الشاي الدافئ في السابعة وفتحت نافذة الغرفة الصغيرة. ",
    "Persian": "پرستار ساعت هفت چای گرم آورد و پنجره را باز می\u200cکند تا هوا بیاید. ",
    "Hebrew": "הָאָחוֹת הביאה תה חם בשעה שבע ופתחה את חלון החדר הקטן.\u200f ",
    "Hindi": "नर्स सात बजे गर्म चाय लाई और उसने कमरे की खिड़की खोल दी क्\u200dष। ",
    "Tamil": "செவிலியர் ஏழு மணிக்கு சூடான தேநீர் கொண்டு வந்து ஜன்னலைத் திறந்தார். ",
    "Thai": "พยาบาลนำชาอุ่นมาให้ตอนเจ็ดโมงและเปิดหน้าต่างห้องให้ลมเข้ามา",
    "Khmer": "គិលានុបដ្ឋាយិកា\u200bបាន\u200bយក\u200bតែ\u200bក្តៅ\u200bមក\u200bនៅ\u200bម៉ោង\u200bប្រាំពីរ។",
    "Chinese": "护士七点送来了热茶、然后打开了房间的窗户、让新鲜空气进来。",
    "Japanese": "看護師は七時に温かいお茶を持ってきて、部屋の窓を開けてくれました。",
    "Korean": "간호사가 일곱 시에 따뜻한 차를 가져와서 방의 창문을 열어 주었습니다. ",
    "emoji": "👩🏽\u200d⚕️🫖🌅🪟☕️👨\u200d👩\u200d👧🏳️\u200d🌈🕖🛏️🌬️🍃😀🙏🏿💊🩺🚪🧣🌿🌼🐦☀️",
    "braille": "⠠⠹⠑⠀⠝⠥⠗⠎⠑⠀⠃⠗⠕⠥⠛⠓⠞⠀⠺⠜⠍⠀⠞⠑⠁⠀⠁⠞⠀⠎⠑⠧⠑⠝",
    "symbols": "∀x∈ℵ: ⌈x⌉≈⌊x⌋ ⇒ ∑∫∂∇ ≤ ≥ ≠ ± ÷ √ ∞ ♪♫♬ ⟨ψ|φ⟩ ⊗ ⊕ ⋈",
    "private use": "".join(map(chr, range(0xE000, 0xE040))),
}
CONTROLS = {chr(c) for c in [*range(0x20), *range(0x7F, 0xA0)]} - set("\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85") | {"\ufeff"}
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(sorted(set("".join(SENTENCES.values())))),
        st.sampled_from(
            "\t\n\r\x0b\x0c\x1c\x1f\x85\u2028\u2029 \u00a0\u3000\u00ad\u200b\u200c\u200d\u200f\u202e\ufe0f\ufeff\0"
        ),
        st.sampled_from("e\u0301\u0323\u0344\u0f73\u1112\u1161\u11a8\u2126\uf900\u093c\u05b0"),
    )
)


@given(TEXT)
def test_normalise_again_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once


@given(TEXT)
def test_normalise_changes_nothing_but_controls_white_space_and_the_unicode_form(text):
    shown = "".join(c for c in text if c not in CONTROLS)
    assert normalise(text).split() == unicodedata.normalize("NFC", shown).split()
    assert changed(text, normalise(text)) == (text.split() != normalise(text).split())
    assert normalise(text) == unicodedata.normalize("NFC", normalise(text))


@settings(deadline=None)  # the first call loads a library
@given(TEXT, st.integers(1, 40))
def test_a_text_is_too_short_by_its_code_points_alone(text, least):
    normalised = normalise(text)
    assert len(list(candidates([normalised], least))) == (len(normalised) >= least)


def test_line_ends_of_every_kind_end_lines_and_joined_words_stay_apart():
    ends = ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]
    assert normalise("".join(f"word{end}" for end in ends)) == "\n".join(["word"] * len(ends))
    assert normalise("a\n\r\n\r\n\rb \t c\x1fd") == "a\n\n\nb \t c d"


@pytest.mark.parametrize("script", SENTENCES)
def test_every_script_passes_unchanged_and_is_kept(script):
    text = unicodedata.normalize("NFC", SENTENCES[script]).strip()
    assert normalise(text) == text
    assert not changed(SENTENCES[script] + "  \n", normalise(SENTENCES[script]))
    assert kept([text, text])[0] == [text]


@pytest.mark.parametrize("script", SENTENCES)
def test_near_copies_are_found_and_others_kept_alike_in_every_script(script):
    """Before: without spaces a text was one word, and of signs alone every text was a copy of the first."""
    signs = [c for c in SENTENCES[script] if not c.isspace()]
    gap = "" if " " not in SENTENCES[script].strip() else " "
    words = SENTENCES[script].split() if gap else signs
    text = gap.join((words * 9)[:200])
    near, other = text + gap + words[0], normalise(gap.join(reversed((words * 9)[:200])))
    found, counts = kept([text, near, other])
    assert found == [text, other]
    assert (counts.exact_duplicates, counts.near_duplicates) == (0, 1)


@pytest.mark.parametrize("script", ["Hindi", "Thai", "Hebrew", "Tamil", "Khmer"])
def test_vowel_signs_and_tone_marks_tell_words_apart(script):
    """Before: a mark was between words, and never part of one."""
    text = SENTENCES[script] * 3
    bare = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Mc"))
    assert len(kept([text, bare], similarity=0.5)[0]) == 2


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.characters(categories=["So", "Sm", "Sc", "Sk", "Po", "Pd", "Co", "No"]), min_size=40), max_size=4
    )
)
def test_texts_without_words_are_no_copies_unless_they_are_alike(texts):
    clean = list(dict.fromkeys(map(normalise, texts)))
    signs = [set(zip(*("".join(text.lower().split())[i:] for i in range(5)), strict=False)) for text in clean]
    if all(len(a & b) * 3 < len(a | b) for i, a in enumerate(signs) for b in signs[:i]):
        assert len(kept(clean, 1, similarity=0.9)[0]) == len([text for text in clean if text])


def kept(texts, least=10, similarity=0.8):
    counts, copies = CleaningCounts(), Copies(similarity)
    return [c.text for c in candidates(list(map(normalise, texts)), least) if copies.keep(c, counts)], counts
