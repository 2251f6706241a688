"""Which files paths, directories, globs and URLs stand for."""
import gzip
import hashlib
import os
import pathlib
import re
import sysconfig

import pytest

from mtp_jax.config import BadInput
from mtp_jax.data.files import digest, files, name_hash
from mtp_jax.data.kinds import recognized
from mtp_jax.data.records import Document, Piece, Reader, Reading


def tree(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('' if 'empty' in name else name)


def names(given) -> list[str]:
  return sorted(file.name for file in files(given, '--input'))


def test_files_and_directories_are_found_once_and_hidden_ones_are_not(tmp_path, monkeypatch):
  tree(tmp_path, 'a/one.txt', 'a/deep/two.bin', 'a/.hidden', 'a/.git/config', 'a/empty.txt',
       'b/a/one.txt', 'single.txt', '.given/x.txt')
  os.mkfifo(tmp_path / 'a/pipe')
  os.symlink(tmp_path / 'single.txt', tmp_path / 'a/link.txt')
  monkeypatch.setenv('HOME', str(tmp_path))
  given = ('~/a', str(tmp_path / 'a/one.txt'), str(tmp_path / 'single.txt'), '~/b/a', '~/.given')
  assert names(given) == [
      '.given/x.txt', 'a/deep/two.bin', 'a/empty.txt', 'a/link.txt', 'a/one.txt', 'a/one.txt~']
  sizes = {file.name: file.bytes for file in files(given, '')}
  assert sizes['a/link.txt'] == len('single.txt') and sizes['a/one.txt~'] == len('b/a/one.txt')


def test_globs_name_files_from_the_folder_before_the_first_wildcard(tmp_path):
  tree(tmp_path, 'c/x/1.jsonl', 'c/x/2.jsonl', 'c/x/3.txt', 'c/y/1.jsonl', 'c/odd[1].txt')
  assert names((f'{tmp_path}/c/x/*.jsonl',)) == ['x/1.jsonl', 'x/2.jsonl']
  assert names((f'{tmp_path}/c/*/1.jsonl',)) == ['c/x/1.jsonl', 'c/y/1.jsonl']
  assert names((f'{tmp_path}/c/**/*.jsonl',)) == ['c/x/1.jsonl', 'c/x/2.jsonl', 'c/y/1.jsonl']
  assert names((f'{tmp_path}/c/odd[1].txt',)) == ['odd[1].txt']


def test_files_come_in_the_order_of_their_names_hashes(tmp_path):
  tree(tmp_path, *[f'c/{i}.txt' for i in range(50)])
  in_order = [file.name for file in files((str(tmp_path / 'c'),), '')]
  assert in_order == sorted(in_order, key=lambda name: hashlib.sha256(name.encode()).digest())
  assert len(in_order) == 50
  assert name_hash('c/7.txt') == int(hashlib.sha256(b'c/7.txt').hexdigest()[:16], 16)


@pytest.mark.parametrize('given', ['missing', 'nothing', 'only hidden', 'missing/*.txt'])
def test_paths_without_files_are_refused(tmp_path, given):
  (tmp_path / 'nothing').mkdir()
  tree(tmp_path, 'only hidden/.x')
  with pytest.raises(BadInput, match=r"^--input: '.*' holds no file.*; give text files, JSON lines, Parquet"):
    files((str(tmp_path / given),), '--input')


def make_fifo(path):
  os.mkfifo(path)


@pytest.mark.parametrize('name, make, reason', [
    ('missing', lambda path: None, 'there is none of this name; commas separate names'),
    ('*.txt', lambda path: None, 'nothing matches'),
    ('folder', lambda path: path.mkdir(), 'it is empty'),
    ('link', lambda path: path.symlink_to('away'), "it is a link to 'away', where nothing is"),
    ('circle', lambda path: path.symlink_to('circle'), "it is a link to 'circle', where nothing is"),
    ('pipe', make_fifo, 'it is a pipe or a device, which cannot be read twice, so write it to a file'),
    ('-', lambda path: None, 'stdin cannot be read twice, so write it to a file')])
def test_what_is_no_file_is_refused_with_the_reason(tmp_path, monkeypatch, name, make, reason):
  monkeypatch.chdir(tmp_path)
  make(tmp_path / name)
  with pytest.raises(BadInput, match=re.escape(f'--input: {name!r} holds no file: {reason}')):
    files((name,), '--input')


@pytest.mark.parametrize('given', ['a/closed/x.txt', 'a/closed/*.txt', 'a/*/*.txt', '**/x.txt', 'a/c*/x.txt'])
def test_a_folder_that_may_not_be_read_is_never_left_out_in_silence(tmp_path, monkeypatch, given):
  for name in ('open', 'closed'):
    (tmp_path / 'a' / name).mkdir(parents=True)
    (tmp_path / 'a' / name / 'x.txt').write_text('x')
  monkeypatch.chdir(tmp_path)
  closed = str(tmp_path / 'a' / 'closed')
  monkeypatch.setattr(os, 'access', lambda path, _: os.path.abspath(path) != closed)  # since root may read all
  with pytest.raises(BadInput, match=r"^--input: cannot read '.*a/closed/?' \(Permission denied\); make it readable"):
    files((given,), '--input')


@pytest.mark.parametrize('url, reason', [
    ('zip://a.txt::{folder}/none.zip', 'none.zip: No such file or directory'),
    ('http://127.0.0.1:9/x.txt', '127.0.0.1:9'), ('http://127.0.0.1:9/folder/', '127.0.0.1:9')])
def test_an_address_that_leads_nowhere_is_one_line_with_the_reason(tmp_path, url, reason):
  with pytest.raises(BadInput, match=re.escape(reason)) as raised:
    files((url.format(folder=tmp_path),), '--input')
  assert 'holds no file' not in str(raised.value) and '[Errno' not in str(raised.value)


def test_a_file_is_named_as_it_was_given_wherever_links_lead(tmp_path):
  """As in a cache of downloads: links with names to files without, in folders that are links too."""
  tree(tmp_path, 'blobs/4f2a', 'blobs/9c1b', 'else/where/deep.txt')
  (tmp_path / 'snapshot').mkdir()
  (tmp_path / 'snapshot/a.jsonl').symlink_to('../blobs/4f2a')
  (tmp_path / 'snapshot/more').symlink_to('../else/where')
  (tmp_path / 'else/where/up').symlink_to('../../snapshot')  # a circle
  (tmp_path / 'latest').symlink_to('snapshot')
  for url in ('', 'file://', 'local://'):
    given = url + str(tmp_path)
    assert names((f'{given}/latest',)) == ['latest/a.jsonl', 'latest/more/deep.txt']
    assert names((f'{given}/snapshot/*.jsonl',)) == ['snapshot/a.jsonl']
    assert names((f'{given}/snapshot/a.jsonl', f'{given}/blobs')) == ['a.jsonl', 'blobs/9c1b']


@pytest.mark.parametrize('url', ['', 'file://'])
def test_a_link_to_nowhere_is_named_rather_than_left_out(tmp_path, url):
  tree(tmp_path, 'in/a.txt')
  (tmp_path / 'in/b.txt').symlink_to('../annex/8d1f')
  with pytest.raises(BadInput, match=r"^--input: '.*/in/b.txt' is a link to '../annex/8d1f', where nothing is; fetch"):
    files((f'{url}{tmp_path}/in',), '--input')


def test_names_that_are_not_utf8_do_no_harm(tmp_path):
  with open(os.fsencode(tmp_path) + b'/\xff.txt', 'wb') as file:
    file.write(b'x')
  file, = files((str(tmp_path),), '')
  assert file.name.endswith('/\\xff.txt')
  assert list(Reader(Piece(file), Reading(), '')) == [Document(file.name, b'x')]


def test_without_paths_the_files_are_the_standard_library():
  library = files((), '')
  by_name = {file.name: file for file in library}
  assert len(by_name) == len(library) > 1000 and {'random.py', 'json/decoder.py'} <= by_name.keys()
  assert all(name.endswith('.py') for name in by_name)
  assert not [name for name in by_name if 'site-packages' in name or 'dist-packages' in name]
  content = pathlib.Path(sysconfig.get_path('stdlib'), 'random.py').read_bytes()
  assert digest(by_name['random.py'], '') == hashlib.sha256(content).hexdigest()


def test_files_elsewhere_are_found_and_read_through_fsspec(memory):
  for name in ('c/1.jsonl', 'c/deep/2.txt', 'c/.hidden/3.txt'):
    memory.pipe_file(f'/bucket/{name}', b'{"text": "x"}\n')
  memory.pipe_file('/bucket/c/4.txt.gz', gzip.compress(b'packed', mtime=0))
  assert names(('memory://bucket/c',)) == ['c/1.jsonl', 'c/4.txt.gz', 'c/deep/2.txt']
  assert names(('memory://bucket/c/*.jsonl',)) == ['c/1.jsonl']
  assert names(('memory://bucket/c/deep/2.txt',)) == ['2.txt']
  inputs = recognized(files(('memory://bucket/c',), ''), Reading(), '')
  read = {file.name: list(Reader(Piece(file), Reading(), '')) for file in inputs}
  assert read['c/1.jsonl'] == [Document('c/1.jsonl@0', b'x')]
  assert read['c/4.txt.gz'] == [Document('c/4.txt.gz', b'packed')]
  with pytest.raises(BadInput, match='holds no file'):
    files(('memory://bucket/nothing',), '--input')


@pytest.mark.parametrize('url', ['gs://bucket/x', 's3://bucket/x', 'nowhere://x'])
def test_a_protocol_without_its_package_is_one_line(url, monkeypatch):
  def url_to_fs(url):
    raise ImportError('Please install gcsfs')
  monkeypatch.setattr('mtp_jax.data.files.fsspec.core.url_to_fs', url_to_fs)
  with pytest.raises(BadInput, match=rf"^--input: '{url}': Please install gcsfs$"):
    files((url,), '--input')
